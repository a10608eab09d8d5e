"""Blocks of the library, what a search begins with and models of the results, each made by several processes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import timm
import torch
from libraries import assert_same_library
from optuna.trial import TrialState
from rich.console import Console
from torch import Tensor, nn

from nas_kd.arguments.parts import changed
from nas_kd.arguments.study import parse_study
from nas_kd.data.augment import default_augmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.genotype import Genotype
from nas_kd.library.building import LibrarySpec, build_library, open_builder
from nas_kd.library.effort import Step
from nas_kd.library.library import Library
from nas_kd.pipeline import ahead, helpers, sharing
from nas_kd.pipeline.baselines import WantedModel, whole_space
from nas_kd.pipeline.helpers import Claims, Helpers, done_file, helping
from nas_kd.pipeline.refining import is_refined
from nas_kd.pipeline.search import search
from nas_kd.pipeline.sharing import refine_all, sharing_library
from nas_kd.preparation.job import Job, prepare
from nas_kd.preparation.materials import Materials, gather
from nas_kd.progress import Advance, Stages
from nas_kd.results.refine import Refined
from nas_kd.search.storage import close_storage
from nas_kd.search.workers import worker_name
from nas_kd.training import loop
from nas_kd.workers import pool

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SETTINGS = (
    "--model test_resnet --img-size 32 --budget params=60% --train-images 96 --teacher-epochs 1 "
    "--proxy-epochs 2 --refine-epochs 2 --views 1 --no-base-bounds --library-budget 0 --trials 11 -q "
    "--space width=0.25/0.5/1,conv=standard/depthwise --no-search-stages"
)
QUIET = Stages(Console(stderr=True), quiet=True)
NOTHING = {"library": 0.0, "models": 0.0}  # seconds that must be left


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, Materials]]:
    """Of a base with weights from elsewhere: what these were decides which teacher is the study's."""
    out = tmp_path_factory.mktemp("study")
    weights = out / "weights.pth"
    torch.save(timm.create_model("test_resnet", in_chans=1, num_classes=7).state_dict(), weights)
    job = prepare(parse_study([*SETTINGS.split(), "--out", str(out), "--initial-checkpoint", str(weights)]))
    yield gather(job, QUIET)
    close_storage(job.storage)


def plan_of(job: Job, epochs: int) -> list[WantedModel]:
    whole = whole_space(job)
    assert whole is not None
    return [
        WantedModel(role="front", genotype=job.space.table.cheapest("params"), space=job.space, epochs=epochs),
        WantedModel(role="uniform", genotype=Genotype.from_json(narrowest(whole)), space=whole, epochs=epochs),
    ]


def narrowest(space: object) -> str:
    table = space.table  # type: ignore[attr-defined]
    return table.genotype([0] * len(table.blocks)).to_json()


def state(refined: Refined) -> dict[str, Tensor]:
    return refined.network.state_dict()


@pytest.fixture(scope="module")
def blocks(study: tuple[Job, Materials]) -> tuple[nn.Module, Images, LibrarySpec]:
    materials = study[1]
    images = AugmentedImages(materials.splits.train, default_augmentation("digits"), 0).sample(48)
    return (
        materials.base.network,
        images,
        LibrarySpec(images=32, holdout=16, rounds=(2, 2), batch_size=16, anchor=False),
    )


Given = tuple[nn.Module, Images, LibrarySpec]


@pytest.fixture(scope="module")
def alone(study: tuple[Job, Materials], blocks: Given, tmp_path_factory: pytest.TempPathFactory) -> Library:
    base, images, spec = blocks
    return build_library(base, study[0].space.analysis, images, spec, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def others(study: tuple[Job, Materials]) -> Iterator[Helpers]:
    """One process beside this one, in all stages."""
    with helping(study[0]) as helpers:
        yield helpers
    assert not list(study[0].cache.glob("sharing-*"))


@contextmanager
def two_threads() -> Iterator[None]:
    """As on a machine of two cores."""
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def build_shared(others: Helpers, given: Given, told: list[str]) -> Library:
    job, (base, images, spec) = others.job, given
    shutil.rmtree(others.folder / "library", ignore_errors=True)
    with two_threads(), sharing_library(others, *given) as share:
        return open_builder(base, job.space.analysis, images, spec, job.cache).build(told.append, share)


@pytest.fixture(scope="module")
def shared(others: Helpers, blocks: Given) -> tuple[Library, list[str]]:
    """A library of which this process makes one block, the other all others, and what is said meanwhile. The other has
    it from then on."""
    told, work = list[str](), Claims.work
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "WORTH", NOTHING)
        patch.setattr(Claims, "work", lambda own, parts, do, advance: [*work(own, parts[:1], do, advance), *parts[1:]])
        return build_shared(others, blocks, told), told


def test_another_process_makes_the_same_blocks(
    shared: tuple[Library, list[str]], others: Helpers, alone: Library
) -> None:
    library, told = shared
    assert done_file(others.folder / "library", others.others[0].pid).exists()
    assert sum(step.share for step in told if isinstance(step, Step)) == pytest.approx(1)
    assert_same_library(library, alone)


def test_the_same_process_then_trains_the_same_models(
    study: tuple[Job, Materials],
    others: Helpers,
    shared: tuple[Library, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job, materials = study[0].with_library(shared[0]), study[1]  # as the other has it
    plan, told = plan_of(job, 2), []
    monkeypatch.setattr(sharing, "WORTH", NOTHING)
    with monkeypatch.context() as context, caplog.at_level(logging.WARNING):
        context.setattr(Claims, "work", lambda claims, parts, do, advance: None)  # the other does it all
        with two_threads():
            beside = refine_all(job, plan, materials, lambda words, steps=1, /: told.append(words), others)
    assert not caplog.records
    assert len(told) == sum(wanted.epochs for wanted in plan)  # each by the other
    for path in job.cache.glob("refined-*"):
        path.unlink()
    monkeypatch.setattr(sharing, "WORTH", {"models": float("inf")})
    here = refine_all(job, plan, materials, lambda words, steps=1, /: None)
    for one, other in zip(beside, here, strict=True):
        assert one.test_accuracy == other.test_accuracy
        assert all((state(one)[name] == tensor).all() for name, tensor in state(other).items())


def search_anew(job: Job, materials: Materials, others: Helpers | None) -> list[tuple[Any, ...]]:
    """What there is to say of the trials of a search, but for times."""
    found = []
    for trial in search(job, materials, QUIET, others).trials:
        assert trial.state == TrialState.PRUNED or trial.user_attrs["seconds"] > 0.01
        noted = {key: own for key, own in trial.user_attrs.items() if key != "seconds"}
        found.append((trial.state, trial.params, trial.values and trial.values[0], noted))
    optuna.delete_study(study_name=job.settings.name, storage=job.storage)
    return found


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs that this process has trained."""
    epochs, run_epoch = list[int](), loop._run_epoch

    def counted(stepper: Any, data: Any, epoch: int) -> float:
        epochs.append(epoch)
        return run_epoch(stepper, data, epoch)

    monkeypatch.setattr(loop, "_run_epoch", counted)
    return epochs


def test_trials_come_to_the_same_whoever_trained_their_students(
    study: tuple[Job, Materials],
    others: Helpers,
    shared: tuple[Library, list[str]],
    trained_here: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, materials = study[0].with_library(shared[0]), study[1]  # as the other has it
    for name in ("WORTH", "BEGIN"):
        monkeypatch.setattr(ahead, name, 0.0)
    here, take = search_anew(job, materials, None), Claims.take
    once = len(trained_here)

    def first_alone(claims: Claims, number: int, do: Any, advance: Advance) -> bool:
        return number == 0 and take(claims, number, do, advance)  # the other process takes all others

    monkeypatch.setattr(Claims, "take", first_alone)
    with two_threads():
        beside = search_anew(job, materials, others)
    epochs = [sum(key.startswith("rung/") for key in noted) for *_, noted in here if "source" in noted]
    known = len(epochs) + 1  # and the first that is proposed: the others are proposed beside it
    assert 4 < known < len(here)
    assert beside[:known] == here[:known]
    assert len({noted["digest"] for *_, noted in beside}) == len(beside) == len(here)
    assert len(trained_here) - once <= once - sum(epochs[1:])  # the other may take the first, too
    assert not list(job.cache.glob("trials-*/*.resume"))


def test_students_of_a_process_that_dies_are_trained_by_their_trials(
    study: tuple[Job, Materials], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, materials = study

    first = f"{ahead.STAGE}-0"

    class Dying(pool.LocalWorker):
        def start(self) -> None:
            if not self.pid:  # in later rounds it begins, and dies, once more
                for number in (1, 2):
                    Path(self.command[3], first, f"{number}.txt").touch()
            self.command = [sys.executable, "-c", "raise SystemExit('out of memory')"]
            super().start()

    here = search_anew(job, materials, None)
    for name in ("WORTH", "BEGIN"):
        monkeypatch.setattr(ahead, name, 0.0)
    monkeypatch.setattr(pool, "LocalWorker", Dying)
    with two_threads(), helping(job) as dying:
        (dying.folder / first).mkdir()
        assert search_anew(job, materials, dying)[:9] == here[:9]


def test_blocks_of_a_process_that_is_killed_are_made_here(
    others: Helpers, blocks: Given, alone: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hear = Claims.listen

    def listen(claims: Claims, advance: Advance) -> None:
        hear(claims, advance)
        for other in others.others:  # as soon as it has made an entry
            if other.code() is None and list(others.job.cache.glob("library-*/layer*")):
                os.kill(other.pid, signal.SIGKILL)

    monkeypatch.setattr(sharing, "WORTH", NOTHING)
    monkeypatch.setattr(Claims, "listen", listen)
    monkeypatch.setattr(Claims, "work", lambda claims, parts, do, advance: parts)
    shutil.rmtree(others.job.cache / alone.folder.name, ignore_errors=True)
    with caplog.at_level(logging.WARNING):
        library = build_shared(others, blocks, [])
    assert "ended (SIGKILL)" in caplog.text
    assert_same_library(library, alone)


def test_what_a_process_that_dies_leaves_is_trained_here(
    study: tuple[Job, Materials], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job, materials = study
    plan = plan_of(job, 1)

    class Dying(pool.LocalWorker):
        def start(self) -> None:
            folder = Path(self.command[3], "models")
            folder.mkdir()
            (folder / "0.txt").touch()  # it has a model, and dies of it
            self.command = [sys.executable, "-c", "raise SystemExit('out of memory')"]
            super().start()

    monkeypatch.setattr(sharing, "WORTH", NOTHING)
    monkeypatch.setattr(pool, "LocalWorker", Dying)
    with two_threads(), caplog.at_level(logging.WARNING):
        assert len(refine_all(job, plan, materials, lambda words, steps=1, /: None)) == 2
    assert "ended (out of memory)" in caplog.text
    assert all(is_refined(job, wanted, materials) for wanted in plan)


def test_what_a_killed_study_left_is_cleared(study: tuple[Job, Materials]) -> None:
    job, machine = study[0], worker_name().rpartition(":")[0]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name, owner in (("sharing-dead", ended.pid), ("sharing-alive", os.getppid())):
        (job.cache / name).mkdir()
        (job.cache / name / "owner.txt").write_text(f"{machine}:{owner}")
    with helping(job):
        assert not (job.cache / "sharing-dead").exists()
    shutil.rmtree(job.cache / "sharing-alive")


def test_a_process_that_cannot_begin_is_done_without(
    study: tuple[Job, Materials],
    blocks: Given,
    alone: Library,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sharing, "WORTH", NOTHING)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    shutil.rmtree(study[0].cache / alone.folder.name, ignore_errors=True)
    with helping(study[0]) as others, caplog.at_level(logging.WARNING):
        library = build_shared(others, blocks, [])
    assert "there is no process beside this one: No such file" in caplog.text
    assert_same_library(library, alone)


@pytest.mark.parametrize(
    ("gpus", "threads", "free", "batch_size", "count"),
    [
        (1, 16, 80, 32, 4),  # small steps: several at once
        (1, 4, 80, 32, 2),  # as many as there are cores for
        (1, 16, 9, 32, 2),  # or memory
        (2, 16, 80, 32, 8),
        (1, 16, 80, 1 << 20, 1),  # a GPU that is busy with one
        (2, 16, 80, 1 << 20, 2),
    ],
)
def test_how_many_share_a_gpu(
    study: tuple[Job, Materials], gpus: int, threads: int, free: int, batch_size: int, count: int
) -> None:
    settings = changed(study[0].settings, jobs=1, device=None, batch_size=batch_size)
    job = replace(study[0], settings=settings, device=torch.device("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 80 << 30))
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(helpers, "_fitting", lambda: 20)
        assert helpers.places(job, 20) == count
        assert helpers.places(job, 1) == 1
        assert helpers.places(job, 20, light=True) == max(count, min(4 * gpus, 8) if batch_size > 32 else count)
