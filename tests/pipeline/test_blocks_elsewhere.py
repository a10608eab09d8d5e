"""Blocks of the library that a worker on another machine makes: its folder is another one, and files are fetched."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from libraries import assert_same_library
from optuna.trial import TrialState
from other_workers import only_after, others_at_work, shared_storage
from rich.console import Console
from torch import nn
from warm import warm_python

from nas_kd.arguments.study import parse_study
from nas_kd.arguments.worker import WorkerSettings, parse_worker
from nas_kd.data.augment import default_augmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.errors import ArtifactError, StudyError
from nas_kd.library.building import LibrarySpec, build_library, open_builder
from nas_kd.library.effort import Step
from nas_kd.library.library import Library, made_choices
from nas_kd.pipeline import blocks_elsewhere, sharing
from nas_kd.pipeline.blocks_elsewhere import BLOCKS, FILE, end_blocks, forget_blocks, take_blocks
from nas_kd.pipeline.helpers import helping
from nas_kd.pipeline.sharing import sharing_library
from nas_kd.preparation.job import Job, prepare
from nas_kd.preparation.materials import gather
from nas_kd.progress import Stages
from nas_kd.search.jobs import LIBRARY, do_jobs, open_jobs, post_jobs, remove_jobs
from nas_kd.search.storage import close_storage
from nas_kd.study import main

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SMALL = "--model test_resnet --img-size 32 --train-images 96 --teacher-epochs 1 --refine-epochs 1 --views 1 "
SMALL += "--no-base-bounds --study-name s -q --space width=0.25/0.5/1,conv=standard/depthwise --no-search-stages"
SETTINGS = f"{SMALL} --budget params=60% --proxy-epochs 1 --library-budget 0 --trials 1"
QUIET = Stages(Console(stderr=True), quiet=True)
ELSEWHERE = "of another machine"
Given = tuple[nn.Module, Images, LibrarySpec]


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with shared_storage(getattr(request, "param", "sqlite"), tmp_path_factory.mktemp("storage")) as its_url:
        yield its_url


@pytest.fixture(scope="module")
def study(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, Given]]:
    """A study whose library is about to be built."""
    folder = tmp_path_factory.mktemp("study")
    shared = ["--storage", url, "--artifacts", str(folder / "store"), "--out", str(folder / "out")]
    job = prepare(parse_study([*SETTINGS.split(), *shared]))
    job, materials = gather(job, QUIET)
    images = AugmentedImages(materials.splits.train, default_augmentation("digits"), 0).sample(48)
    spec = LibrarySpec(images=32, holdout=16, rounds=(2, 2), batch_size=16, anchor=False)
    yield job, (materials.base.network, images, spec)
    close_storage(job.storage)


@pytest.fixture(scope="module")
def alone(study: tuple[Job, Given], tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The same library, made by one process."""
    job, (base, images, spec) = study
    return build_library(base, job.space.analysis, images, spec, tmp_path_factory.mktemp("alone"))


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all that were long work."""
    monkeypatch.setattr(sharing, "WORTH", {"library": 0.0, "models": 0.0})


@pytest.fixture
def another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find no folder of the study's."""
    plan = blocks_elsewhere._plan
    monkeypatch.setattr(blocks_elsewhere, "_plan", lambda *given: replace(plan(*given), folder=ELSEWHERE))


def build_shared(study: tuple[Job, Given], told: list[str], threads: int = 2) -> Library:
    job, (base, images, spec) = study
    shutil.rmtree(next(iter(job.cache.glob("library-*")), job.cache / "none"), ignore_errors=True)
    with helping(job) as helpers, as_many(threads), sharing_library(helpers, base, images, spec) as share:
        library = open_builder(base, job.space.analysis, images, spec, job.cache).build(told.append, share)
    forget_blocks(job)
    return library


@contextmanager
def as_many(threads: int) -> Iterator[None]:
    """As on a machine of so many cores."""
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def start_worker(url: str, out: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["--storage", url, "--study-name", "s", "--out", str(out), "--wait", "600", *more]
    python = sys.executable if "--ray=local" in more else warm_python()  # Ray knows its processes by number
    command = [python, "-m", "nas_kd.worker", *arguments]
    # Ray's tasks give way to others by default, and would starve beside a busy process
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def settings_of(url: str, out: Path, *more: str) -> WorkerSettings:
    return parse_worker(["--storage", url, "--study-name", "s", "--out", str(out), *more])


@pytest.mark.parametrize(
    ("url", "more"),
    [("sqlite", ()), ("postgresql", ()), pytest.param("sqlite", ("--ray=local",), marks=pytest.mark.slow)],
    indirect=["url"],
)
@pytest.mark.usefixtures("worth", "another_machine")
def test_a_worker_makes_blocks_that_are_the_same_here(
    study: tuple[Job, Given], alone: Library, url: str, more: tuple[str, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    worker = start_worker(url, tmp_path, "--part", "library", *more)
    began = only_after(lambda jobs: others_at_work(jobs) or worker.poll() is not None)
    monkeypatch.setattr(blocks_elsewhere, "do_jobs", began)
    # another process of this machine might have made them all before that one begins
    monkeypatch.setattr(sharing, "_for_library", lambda job: 1)
    told = list[str]()
    library = build_shared(study, told, threads=1)
    said, errors = worker.communicate()
    assert worker.returncode == 0, errors
    assert more or "blocks of its library" in said
    assert sum(step.share for step in told if isinstance(step, Step)) == pytest.approx(1)
    theirs = {path.name for path in (tmp_path / "cache").glob("library-*/*-*.safetensors")}
    assert theirs
    assert_same_library(library, alone)
    assert optuna.get_all_study_names(study[0].storage) == []
    left = [*study[0].cache.glob("inputs-*"), *study[0].cache.glob("*.zip"), *(tmp_path / "cache").glob("*.zip")]
    assert left == []


@pytest.mark.usefixtures("worth")
def test_what_a_killed_process_was_at_is_made_here(
    study: tuple[Job, Given], alone: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed, states = list[int](), list[TrialState]()

    def kill(jobs: optuna.Study) -> bool:
        for process in [] if killed else others_at_work(jobs):
            os.kill(process, signal.SIGKILL)
            killed.append(process)
        return bool(killed)

    def remove(storage: Any, name: str, kind: str) -> None:
        jobs = open_jobs(storage, name, kind)
        states.extend(trial.state for trial in jobs.get_trials()) if jobs is not None else None
        remove_jobs(storage, name, kind)

    monkeypatch.setattr(blocks_elsewhere, "do_jobs", only_after(kill))
    monkeypatch.setattr(blocks_elsewhere, "remove_jobs", remove)
    with caplog.at_level(logging.WARNING, "nas_kd"):
        library = build_shared(study, [])
    assert "ended (SIGKILL)" in caplog.text
    blocks = len([block for block in study[0].space.blocks if made_choices(block)])
    assert sorted(states) == [TrialState.COMPLETE] * blocks + [TrialState.FAIL]  # each once, one was taken over
    assert_same_library(library, alone)


@pytest.mark.usefixtures("worth")
def test_a_block_that_is_lost_on_its_way_is_made_here(
    study: tuple[Job, Given], alone: Library, caplog: pytest.LogCaptureFixture
) -> None:
    job = study[0]
    key = f"{alone.folder.name} {job.space.blocks[0].name}"
    do_jobs(post_jobs(job.storage, "s", [key], LIBRARY), lambda _: (0.0, {FILE: "0" * 64}), grace=60)
    with caplog.at_level(logging.WARNING, "nas_kd"):
        library = build_shared(study, [])
    assert "a block that was made elsewhere is made here again" in caplog.text
    assert_same_library(library, alone)


@pytest.mark.usefixtures("worth", "another_machine")
def test_what_a_worker_cannot_begin_with_it_says(
    study: tuple[Job, Given], alone: Library, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (
        ({"version": "0.0.1"}, "was begun by nas_kd 0.0.1"),
        ({"library": "library-of-other-versions"}, "this machine makes another library"),
        ({"files": {}}, "the files of the study are not here"),
        ({"inputs": "elsewhere.safetensors"}, "elsewhere.safetensors is missing or was altered"),
    )
    said = list[str]()

    def join(jobs: Any, *arguments: Any, **more: Any) -> int:
        plan = jobs.user_attrs[BLOCKS]
        for (changed, _), folder in zip(cases, "abcd", strict=True):
            jobs.set_user_attr(BLOCKS, {**plan, **changed})
            with pytest.raises((StudyError, ArtifactError)) as caught:
                take_blocks(settings_of(url, tmp_path / folder), QUIET)
            said.append(str(caught.value))
        return do_jobs(jobs, *arguments, **more)

    monkeypatch.setattr(blocks_elsewhere, "do_jobs", join)
    monkeypatch.setattr(sharing, "_for_library", lambda job: 1)
    assert build_shared(study, []).entries.keys() == alone.entries.keys()
    for (_, words), line in zip(cases, said, strict=True):
        assert words in line


def test_where_there_is_no_library_to_make_a_worker_goes_on(study: tuple[Job, Given], url: str, tmp_path: Path) -> None:
    naps = list[float]()
    assert take_blocks(settings_of(url, tmp_path), QUIET) is None
    post_jobs(study[0].storage, "s", [], LIBRARY)  # of which it is about to be told
    assert (
        take_blocks(settings_of(url, tmp_path, "--wait", "1"), QUIET, lambda s: naps.append(s) or time.sleep(s)) is None
    )
    assert naps
    end_blocks(study[0])  # all are made, its trials are about to begin
    assert take_blocks(settings_of(url, tmp_path), QUIET) == 0
    post_jobs(study[0].storage, "t", [], LIBRARY)
    with pytest.raises(StudyError, match="holds 2 studies: give --study-name"):
        take_blocks(replace(settings_of(url, tmp_path), study_name=""), QUIET)
    for name in "st":
        remove_jobs(study[0].storage, name, LIBRARY)


@pytest.mark.usefixtures("worth")
def test_a_worker_that_waits_does_its_part_of_the_whole_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    worker = start_worker(url, tmp_path / "worker")
    began = only_after(lambda jobs: others_at_work(jobs) or worker.poll() is not None)
    monkeypatch.setattr(blocks_elsewhere, "do_jobs", began)
    shared = f"--storage {url} --artifacts {tmp_path / 'store'} --out {tmp_path / 'out'} --no-baselines --no-onnx"
    assert main(f"{SMALL} --budget params=60% --proxy-epochs 1 --trials 3 --front 1 {shared}".split()) == 0
    said, errors = worker.communicate()
    assert worker.returncode == 0, errors
    assert "of its trials were this worker's" in said
    assert "blocks of its library" in said
