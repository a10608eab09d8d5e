"""Models of the results that are trained in several processes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from torch import Tensor

from nas_kd.arguments.study import parse_study
from nas_kd.genotype import Genotype
from nas_kd.pipeline import sharing
from nas_kd.pipeline.baselines import Wanted, whole_space
from nas_kd.pipeline.refining import is_refined
from nas_kd.pipeline.sharing import Claims, refine_all
from nas_kd.preparation.job import Job, prepare
from nas_kd.preparation.materials import Materials, gather
from nas_kd.progress import Stages
from nas_kd.results.refine import Refined
from nas_kd.search.storage import close_storage
from nas_kd.workers import crew

SETTINGS = (
    "--model test_resnet --img-size 32 --budget params=100% --train-images 96 --teacher-epochs 1 --proxy-epochs 1 "
    "--refine-epochs 2 --views 1 --no-base-bounds --library-budget 0 --jobs 2 -q "
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


def test_another_process_trains_the_same_models(
    study: tuple[Job, Materials], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job, materials = study
    plan, told = plan_of(job, 2), []
    monkeypatch.setattr(sharing, "_WORTH", 0.0)
    with monkeypatch.context() as here, caplog.at_level(logging.WARNING):
        here.setattr(Claims, "work", lambda claims, train, advance: None)  # this one leaves everything to the other
        shared = refine_all(job, plan, materials, lambda words, steps=1, /: told.append(words))
    assert not caplog.records
    assert len(told) == sum(wanted.epochs for wanted in plan)  # each by the other
    for path in job.cache.glob("refined-*"):
        path.unlink()
    monkeypatch.setattr(sharing, "_WORTH", float("inf"))
    alone = refine_all(job, plan, materials, lambda words, steps=1, /: None)
    for one, other in zip(shared, alone, strict=True):
        assert one.test_accuracy == other.test_accuracy
        assert all((state(one)[name] == tensor).all() for name, tensor in state(other).items())


def test_what_a_process_that_dies_leaves_is_trained_here(
    study: tuple[Job, Materials], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job, materials = study
    plan = plan_of(job, 1)

    class Dying(crew.LocalWorker):
        def start(self) -> None:
            (folder,) = job.cache.glob("refining-*")
            (folder / "0.txt").touch()  # it has a model, and dies of it
            self.command = [sys.executable, "-c", "raise SystemExit('out of memory')"]
            super().start()

    monkeypatch.setattr(sharing, "_WORTH", 0.0)
    monkeypatch.setattr(sharing, "LocalWorker", Dying)
    with caplog.at_level(logging.WARNING):
        assert len(refine_all(job, plan, materials, lambda words, steps=1, /: None)) == 2
    assert "ended (out of memory)" in caplog.text
    assert all(is_refined(job, wanted, materials) for wanted in plan)
    assert not list(Path(job.cache).glob("refining-*"))
