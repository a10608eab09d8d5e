"""Models of the results that are trained in several processes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from nas_kd.arguments.study import parse_study
from nas_kd.data.augment import default_augmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.genotype import Genotype
from nas_kd.library.building import LibrarySpec, build_library, open_builder
from nas_kd.library.effort import Step
from nas_kd.library.entries import EntryFile
from nas_kd.library.library import Library
from nas_kd.pipeline import helpers, sharing
from nas_kd.pipeline.baselines import Wanted, whole_space
from nas_kd.pipeline.helpers import Claims, Helpers, done_file, helping
from nas_kd.pipeline.refining import is_refined
from nas_kd.pipeline.sharing import refine_all, sharing_library
from nas_kd.preparation.job import Job, prepare
from nas_kd.preparation.materials import Materials, gather
from nas_kd.progress import Advance, Stages
from nas_kd.results.refine import Refined
from nas_kd.search.storage import close_storage
from nas_kd.workers import crew

SETTINGS = (
    "--model test_resnet --img-size 32 --budget params=100% --train-images 96 --teacher-epochs 1 --proxy-epochs 1 "
    "--refine-epochs 2 --views 1 --no-base-bounds --library-budget 0 -q "
    "--space width=0.5/1,conv=standard/depthwise --no-search-stages"
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, Materials]]:
    out = tmp_path_factory.mktemp("study")
    job = prepare(parse_study([*SETTINGS.split(), "--out", str(out)]))
    yield job, gather(job, Stages(Console(stderr=True), quiet=True))
    close_storage(job.storage)


def plan_of(job: Job, epochs: int) -> list[Wanted]:
    whole = whole_space(job)
    assert whole is not None
    return [
        Wanted(role="front", genotype=job.space.analysis.identity, space=job.space, epochs=epochs),
        Wanted(role="uniform", genotype=Genotype.from_json(narrowest(whole)), space=whole, epochs=epochs),
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


def assert_same(library: Library, alone: Library) -> None:
    files = sorted(path.name for path in alone.folder.glob("*.safetensors"))
    assert sorted(path.name for path in library.folder.glob("*.safetensors")) == files
    for name in files:
        (_, tensors), (_, wanted) = (EntryFile(own.folder / name).read() or (None, {}) for own in (library, alone))
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in wanted.items())
    assert library.entries.keys() == alone.entries.keys()
    for key, entry in library.entries.items():
        assert replace(entry, seconds=0.0) == replace(alone.entries[key], seconds=0.0)


def test_another_process_makes_the_same_blocks(
    others: Helpers, blocks: Given, alone: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told, work = list[str](), Claims.work
    monkeypatch.setattr(sharing, "WORTH", {"library": 0.0, "models": 0.0})
    # this one makes one block, the other all others
    monkeypatch.setattr(
        Claims, "work", lambda own, parts, do, advance: [*work(own, parts[:1], do, advance), *parts[1:]]
    )
    with caplog.at_level(logging.WARNING):
        library = build_shared(others, blocks, told)
    assert not caplog.records
    assert done_file(others.folder / "library", others.others[0].pid).exists()
    assert sum(step.share for step in told if isinstance(step, Step)) == pytest.approx(1)
    assert_same(library, alone)
    shutil.rmtree(library.folder)


def test_the_same_process_then_trains_the_same_models(
    study: tuple[Job, Materials], others: Helpers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job, materials = study
    plan, told = plan_of(job, 2), []
    monkeypatch.setattr(sharing, "WORTH", {"library": 0.0, "models": 0.0})
    with monkeypatch.context() as here, caplog.at_level(logging.WARNING):
        here.setattr(Claims, "work", lambda claims, parts, do, advance: None)  # this one leaves everything to the other
        with two_threads():
            shared = refine_all(job, plan, materials, lambda words, steps=1, /: told.append(words), others)
    assert not caplog.records
    assert len(told) == sum(wanted.epochs for wanted in plan)  # each by the other
    for path in job.cache.glob("refined-*"):
        path.unlink()
    monkeypatch.setattr(sharing, "WORTH", {"models": float("inf")})
    alone = refine_all(job, plan, materials, lambda words, steps=1, /: None)
    for one, other in zip(shared, alone, strict=True):
        assert one.test_accuracy == other.test_accuracy
        assert all((state(one)[name] == tensor).all() for name, tensor in state(other).items())


def test_blocks_of_a_process_that_is_killed_are_made_here(
    others: Helpers, blocks: Given, alone: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hear = Claims.listen

    def listen(claims: Claims, advance: Advance) -> None:
        hear(claims, advance)
        for other in others.others:  # as soon as it has made an entry
            if other.code() is None and list(others.job.cache.glob("library-*/layer*")):
                os.kill(other.pid, signal.SIGKILL)

    monkeypatch.setattr(sharing, "WORTH", {"library": 0.0, "models": 0.0})
    monkeypatch.setattr(Claims, "listen", listen)
    monkeypatch.setattr(Claims, "work", lambda claims, parts, do, advance: parts)
    with caplog.at_level(logging.WARNING):
        library = build_shared(others, blocks, [])
    assert "ended (SIGKILL)" in caplog.text
    assert_same(library, alone)


def test_what_a_process_that_dies_leaves_is_trained_here(
    study: tuple[Job, Materials], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job, materials = study
    plan = plan_of(job, 1)

    class Dying(crew.LocalWorker):
        def start(self) -> None:
            folder = Path(self.command[3], "models")
            folder.mkdir()
            (folder / "0.txt").touch()  # it has a model, and dies of it
            self.command = [sys.executable, "-c", "raise SystemExit('out of memory')"]
            super().start()

    monkeypatch.setattr(sharing, "WORTH", {"library": 0.0, "models": 0.0})
    monkeypatch.setattr(helpers, "LocalWorker", Dying)
    with two_threads(), caplog.at_level(logging.WARNING):
        assert len(refine_all(job, plan, materials, lambda words, steps=1, /: None)) == 2
    assert "ended (out of memory)" in caplog.text
    assert all(is_refined(job, wanted, materials) for wanted in plan)


def test_a_process_that_cannot_begin_is_done_without(
    study: tuple[Job, Materials],
    blocks: Given,
    alone: Library,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sharing, "WORTH", {"library": 0.0, "models": 0.0})
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    shutil.rmtree(study[0].cache / alone.folder.name, ignore_errors=True)
    with helping(study[0]) as others, caplog.at_level(logging.WARNING):
        library = build_shared(others, blocks, [])
    assert "there is no process beside this one: No such file" in caplog.text
    assert_same(library, alone)
