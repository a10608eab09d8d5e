"""Models of the results that a worker on another machine trains: its folder is another one, and files are fetched."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console
from torch import Tensor
from warm import warm_python

from nas_kd.arguments.study import parse_study
from nas_kd.genotype import Genotype
from nas_kd.pipeline import models_elsewhere, search
from nas_kd.pipeline.baselines import WantedModel, whole_space
from nas_kd.pipeline.models_elsewhere import DONE, MODELS, expect_models
from nas_kd.pipeline.refining import is_refined
from nas_kd.pipeline.sharing import refine_all
from nas_kd.preparation.job import Job, prepare
from nas_kd.preparation.materials import Materials, gather
from nas_kd.progress import Stages
from nas_kd.results.refine import Refined
from nas_kd.search.jobs import open_jobs
from nas_kd.search.storage import close_storage
from nas_kd.search.workers import WORKER, worker_name
from nas_kd.workers.bundle import BUNDLE

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SETTINGS = (
    "--model test_resnet --img-size 32 --budget params=100% --train-images 96 --teacher-epochs 1 --proxy-epochs 1 "
    "--refine-epochs 2 --views 1 --no-base-bounds --library-budget 0 --trials 1 --study-name s -q "
    "--space width=0.5/1,conv=standard/depthwise --no-search-stages"
)
Study = tuple[Job, Materials, optuna.Study]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A study whose search is done, in a storage and an artifact store that another machine reaches, but no folder."""
    folder = tmp_path_factory.mktemp("study")
    shared = ["--storage", f"sqlite:///{folder / 'study.db'}", "--artifacts", str(folder / "store")]
    job = prepare(parse_study([*SETTINGS.split(), *shared, "--out", str(folder / "out")]))
    stages = Stages(Console(stderr=True), quiet=True)
    job, materials = gather(job, stages)
    done = search(job, materials, stages)
    done.set_user_attr(BUNDLE, {**done.user_attrs[BUNDLE], "folder": str(folder / "of another machine")})
    yield job, materials, done
    close_storage(job.storage)


def plan_of(job: Job, epochs: int) -> list[WantedModel]:
    """Four models, of two spaces and with and without a teacher."""
    whole = whole_space(job)
    assert whole is not None
    narrow = Genotype.from_json(whole.table.genotype([0] * len(whole.table.blocks)).to_json())
    best = job.space.analysis.identity
    return [
        WantedModel(role="front", genotype=best, space=job.space, epochs=3 * epochs),
        WantedModel(role="no teacher", genotype=best, space=job.space, epochs=epochs),
        WantedModel(role="uniform", genotype=narrow, space=whole, epochs=epochs),
        WantedModel(role="random", genotype=best, space=job.space, epochs=epochs),
    ]


def start_worker(job: Job, out: Path, *more: str) -> subprocess.Popen[str]:
    storage = job.settings.sharing.storage
    assert storage is not None
    arguments = ["--storage", storage, "--study-name", "s", "--out", str(out), "--grace-period", "600"]
    python = sys.executable if "--ray=local" in more else warm_python()  # Ray knows its processes by number
    command = [python, "-m", "nas_kd.worker", *arguments, *more]
    # Ray's tasks give way to others by default, and would starve beside a busy process
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def others_at_work(job: Job) -> list[int]:
    """The other processes that are at a model."""
    jobs = open_jobs(job.storage, "s")
    found = jobs.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if jobs is not None else []
    names = {str(trial.user_attrs[WORKER]) for trial in found if WORKER in trial.user_attrs}
    return [int(name.rpartition(":")[2]) for name in names - {worker_name()}]


def after(event: Callable[[], object]) -> Callable[..., Refined]:
    """Training a model here, once something has happened to another process, which has the other models until then."""
    own = models_elsewhere.refine_in

    def train(*arguments: Any) -> Refined:
        while not event():
            time.sleep(0.05)
        return own(*arguments)

    return train


def state(refined: Refined) -> dict[str, Tensor]:
    return refined.network.state_dict()


def ignore(words: str, steps: float = 1, /) -> None:
    """Tells nobody."""


@pytest.mark.parametrize("ray", ["", pytest.param("--ray=local", marks=pytest.mark.slow)])
def test_a_worker_trains_models_that_are_the_same_here(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray: str
) -> None:
    job, materials, done = study
    expect_models(job, done)
    for path in job.cache.glob("refined-*"):
        path.unlink()
    plan = plan_of(job, 2)
    worker = start_worker(job, tmp_path, *filter(None, [ray]))
    with monkeypatch.context() as here:
        here.setattr(models_elsewhere, "refine_in", after(lambda: others_at_work(job) or worker.poll()))
        told: list[float] = []
        shared = refine_all(job, plan, materials, lambda words, steps=1, /: told.append(steps))
    assert sum(told) == sum(wanted.epochs for wanted in plan)  # those of the worker too
    said, errors = worker.communicate()
    assert (worker.returncode, done.user_attrs[MODELS]) == (0, DONE), errors
    assert ray or "of its models" in said
    assert optuna.get_all_study_names(job.storage) == ["s"]
    fetched = {path.name for path in (tmp_path / "cache").glob("refined-*.safetensors")}
    kept = {path.name for path in job.cache.glob("refined-*.safetensors")}
    assert fetched < kept
    assert len(kept) == 4
    for name in fetched:
        (job.cache / name).unlink()
    alone = refine_all(job, plan, materials, ignore)
    for one, other in zip(shared, alone, strict=True):
        assert one.test_accuracy == other.test_accuracy
        assert all((state(one)[name] == tensor).all() for name, tensor in state(other).items())


def test_what_a_killed_process_was_at_is_trained_here(
    study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job, materials, done = study
    expect_models(job, done)
    plan, killed = plan_of(job, 3), list[int]()

    def kill() -> bool:
        for process in [] if killed else others_at_work(job):
            os.kill(process, signal.SIGKILL)
            killed.append(process)
        return bool(killed)

    with monkeypatch.context() as here, caplog.at_level(logging.WARNING, "nas_kd"):
        here.setattr(models_elsewhere, "refine_in", after(kill))
        models_elsewhere.train_with_workers(job, plan, materials, 2, ignore)  # another process beside this one
    assert "ended (SIGKILL)" in caplog.text
    assert all(is_refined(job, wanted, materials) for wanted in plan)
    jobs = open_jobs(job.storage, "s")
    assert jobs is not None
    states = Counter(trial.state for trial in jobs.get_trials())
    assert states == {TrialState.COMPLETE: 4, TrialState.FAIL: 1}  # each once, and one that was taken over
    refine_all(job, plan, materials, ignore)
    assert optuna.get_all_study_names(job.storage) == ["s"]
    assert done.user_attrs[MODELS] == DONE
