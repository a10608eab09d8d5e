"""A study whose worker ends, or is asked to stop, at any of its writes: nothing is lost, trained twice or left running.

The trials cost nothing, and note, claim, look at rungs and go on from their state as all do.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import servers
import timm
import torch
from injection import Count, Died, Turns, die, die_here, ended_well, fork, two_turns, watched
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from nas_kd.genotype import Genotype
from nas_kd.search import claims, storage, trials, work, workers
from nas_kd.search.budgets import note_budget
from nas_kd.search.claims import is_trained
from nas_kd.search.options import parse_options
from nas_kd.search.rungs import rung_scores
from nas_kd.search.sampler import KnapsackSampler
from nas_kd.search.space import Space
from nas_kd.search.storage import close_storage, open_storage, open_study, sqlite_url
from nas_kd.search.trials import DIRECTIONS, Objective, Proxy
from nas_kd.search.work import Limits, settle
from nas_kd.search.workers import RETRIES, RETRY, retry_dead_trials, retry_lost_trials, undisturbed, worker_name
from nas_kd.training.loop import Run, TrainResult
from nas_kd.training.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # optuna: heartbeat
EPOCHS = 2


@pytest.fixture(scope="module")
def tiny() -> Space[nn.Module]:
    """The widths of two blocks: a trial has few parameters to note."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    pins = [f"{block}:width=1" for block in ("conv1", "layer1.0", "layer2.0")]
    return Space(network, budget="params=60%", img_size=16, options=parse_options("width", pins))


@pytest.fixture(scope="module")
def starts(tiny: Space[nn.Module]) -> list[Genotype]:
    return tiny.starts(2)


def rehearsed(task: Any, data: Any, recipe: Recipe, *, report: Callable[[int, float], None], run: Run) -> TrainResult:
    """What `training.fit` does but for the training: `task` is the genotype, and its digest the score. Each epoch that
    it trains is a line in a file."""
    state = run.checkpoint
    assert state is not None
    scores = [tuple(pair) for pair in json.loads(state.read_text())] if state.exists() else []
    if scores and run.again:
        report(*scores[-1])
    for epoch in range(len(scores) + 1, recipe.epochs + 1):
        with (state.parent / "trained").open("a") as file:
            file.write(f"{task.digest} {epoch}\n")
        scores.append((epoch, int(task.digest[:4], 16) / 2**17 + epoch / 10))
        state.with_suffix(".draft").write_text(json.dumps(scores))
        state.with_suffix(".draft").replace(state)
        report(*scores[-1])
    return TrainResult(accuracies=tuple(scores), losses=(), images=0, seconds=0.0)


@pytest.fixture(autouse=True)
def free_trials(starts: list[Genotype], monkeypatch: pytest.MonkeyPatch) -> None:
    """Students are their genotypes, starts are found once, and nobody waits for long."""
    monkeypatch.setattr(Space, "starts", lambda self, count: starts)
    monkeypatch.setattr(Space, "student", lambda self, genotype: genotype)
    monkeypatch.setattr(Proxy, "prepare", lambda self, student: student)
    monkeypatch.setattr(trials, "student_task", lambda student, recipe, measure: student)
    monkeypatch.setattr(trials, "fit", rehearsed)
    monkeypatch.setattr(claims, "_WAIT", 0.001)
    monkeypatch.setattr(storage, "_CREATOR_SECONDS", 0.0)


class Nap:
    """Waits for what another worker does; a trial that nobody ends is no reason to wait for ever."""

    left = 500

    def __call__(self, seconds: float) -> None:
        self.left -= 1
        assert self.left, "a trial of nobody's runs"
        time.sleep(0.01)


@dataclass(frozen=True)
class Study:
    """A study in a database that is to train so many `students`, and the folder of its trials' states. With `sampler`
    one more is queued that is over budget, and what is not queued is proposed by our own."""

    name: str
    storage: BaseStorage
    folder: Path
    space: Space[nn.Module]
    students: int = 3  # two starts and one that the sampler proposes
    sampler: bool = True

    def command(self) -> None:
        """What the main command does once all is built (`pipeline.search`)."""
        self.work(self.begin())

    def begin(self) -> optuna.Study:
        study = open_study(
            self.storage,
            self.name,
            directions=DIRECTIONS,
            config={"a": 1},
            sampler=KnapsackSampler(self.space, seed=0) if self.sampler else RandomSampler(seed=0),
        )
        assert self.space.budget is not None
        note_budget(study, self.space.budget)
        retry_dead_trials(study)
        retry_lost_trials(study)
        if self.sampler:
            study.enqueue_trial(self.space.point(self.space.analysis.identity), skip_if_exists=True)
        self.space.enqueue(study, 2)
        return study

    def work(self, study: optuna.Study) -> None:
        nothing: Any = None
        proxy = Proxy(views=nothing, val=nothing, recipe=Recipe(epochs=EPOCHS), checkpoints=self.folder)
        work.work(study, Objective(self.space, proxy), Limits(target=lambda: self.students, sleep=Nap()))
        settle(study, 120, Nap())

    def begin_with_retries(self) -> None:
        """As two workers leave it that were killed after their first rungs."""
        study = optuna.create_study(storage=self.storage, study_name=self.name, directions=DIRECTIONS)
        study.set_user_attr(storage.CONFIG, {"a": 1})
        for number, genotype in enumerate(self.space.starts(2)):
            study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"rung/1": 0.3}))
            noted = {"source": "warm start", "rung/1": 0.3, RETRY: 2 * number, RETRIES: 1}
            study.enqueue_trial(self.space.point(genotype), user_attrs=noted)

    def trials(self) -> list[FrozenTrial]:
        names = optuna.get_all_study_names(self.storage)
        return optuna.load_study(study_name=self.name, storage=self.storage).get_trials() if self.name in names else []

    def finished(self) -> dict[int, Any]:
        """What must stay as it is."""
        return {t.number: (t.state, t.values, t.user_attrs, t.constraints) for t in self.trials() if is_trained(t)}

    def running(self) -> list[int]:
        return [trial.number for trial in self.trials() if trial.state == TrialState.RUNNING]

    def result(self) -> list[Any]:
        """What a study is worth, whatever its trials went through."""
        return [
            (trial.state.name, trial.params, trial.values, trial.constraints, rung_scores(trial.user_attrs))
            for trial in undisturbed(self.trials())
            if trial.state != TrialState.FAIL
        ]

    def goes_on(self, whole: list[Any] | None) -> None:
        """The same command again ends well, and with the same result as a `whole` one."""
        before = self.finished()
        self.command()
        self.check(before)
        if whole is not None:
            assert self.result() == whole

    def check(self, before: dict[int, Any]) -> None:
        """Nothing completed is lost, nothing trained twice, no epoch of it either, nothing left running."""
        found = self.trials()
        assert self.finished().items() >= before.items()
        assert not self.running()
        trained = [trial for trial in found if is_trained(trial)]
        assert len({trial.user_attrs["digest"] for trial in trained}) == len(trained)
        assert self.students <= len(trained) <= self.students + 1
        epochs = Counter((self.folder / "trained").read_text().splitlines())
        assert set(epochs.values()) == {1}
        assert not list(self.folder.glob("*.resume"))


NewStudy = Callable[[BaseStorage], Study]


@pytest.fixture(scope="module")
def memory() -> InMemoryStorage:
    return InMemoryStorage()


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RDBStorage]:
    with database(sqlite_url(tmp_path_factory.mktemp("sqlite") / "study.db")) as opened:
        yield opened


@pytest.fixture(scope="module")
def postgresql() -> Iterator[RDBStorage]:
    if servers.postgres_folder() is None:
        pytest.skip("PostgreSQL is not installed")
    with servers.postgres() as server, database(server.url) as opened:
        yield opened


@contextmanager
def database(url: str) -> Iterator[RDBStorage]:
    opened = open_storage(url, grace=10_000)
    assert isinstance(opened, RDBStorage)
    yield opened
    close_storage(opened)


@pytest.fixture
def new_study(tiny: Space[nn.Module], tmp_path: Path) -> NewStudy:
    """Makes studies of their own names and folders."""
    numbers = itertools.count()

    def make(opened: BaseStorage) -> Study:
        name = f"{tmp_path.name} {next(numbers)}"
        (tmp_path / name).mkdir()
        return Study(name, opened, tmp_path / name, tiny)

    return make


@pytest.fixture
def whole(memory: InMemoryStorage, new_study: NewStudy) -> list[Any]:
    """The result of a study that nothing disturbed."""
    study = new_study(memory)
    study.command()
    study.check({})
    return study.result()


@pytest.fixture
def ended() -> str:
    """The name of a worker whose process is there no more."""
    child = fork(lambda: None)
    assert ended_well(child)
    return f"{worker_name().rpartition(':')[0]}:{child}"


def test_a_worker_that_is_killed_after_any_write_leaves_a_study_that_goes_on_as_if_nothing_had_happened(
    memory: InMemoryStorage, new_study: NewStudy, whole: list[Any], ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in itertools.count(1):
        study, count = new_study(memory), Count((at,), die_here)
        with suppress(Died), monkeypatch.context() as another, watched(memory, count):
            for module in (workers, work, trials):
                another.setattr(module, "worker_name", lambda: ended)
            study.command()
        study.goes_on(whole)
        if not count.came:
            break
    assert at > 50


def test_ctrl_c_after_any_write_leaves_nothing_running_and_loses_nothing(
    memory: InMemoryStorage, new_study: NewStudy, whole: list[Any]
) -> None:
    """Once, or twice as an impatient user does."""
    for at in itertools.count(1):
        study, count = new_study(memory), Count(range(at, at + 1 + at % 2), lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt) if at <= 50 else suppress(KeyboardInterrupt), watched(memory, count):
            study.command()
            assert not count.came  # what was asked for is not forgotten
        assert not study.running()
        study.goes_on(whole)
        if not count.came:
            break


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_beside_a_worker_that_is_killed_after_any_write_another_goes_on(
    kind: str, every: int, new_study: NewStudy, request: pytest.FixtureRequest
) -> None:
    """Processes that write by turns, so that the other one sees every state that the first one leaves. Where there are
    both databases each sees every second one, of which the short run takes every second."""
    opened: RDBStorage = request.getfixturevalue(kind)
    both = servers.postgres_folder() is not None
    for at in itertools.count(1 + (kind == "postgresql"), every * (1 + both)):
        study = replace(new_study(get_storage(opened)), students=2, sampler=False)
        study.begin_with_retries()
        survived = two_workers(study, study.begin(), opened, at)
        study.goes_on(None)
        if survived:
            break
    assert at > 15


def two_workers(study: Study, begun: optuna.Study, opened: RDBStorage, at: int) -> bool:
    """Runs two workers, the first of which dies after this write of its own; whether it came to its end before."""
    first, second, ends = two_turns()

    def run(own: Turns, count: Count) -> Callable[[], None]:
        def worker() -> None:
            for end in {*ends} - {own.taken, own.given}:
                os.close(end)
            opened.engine.dispose(close=False)  # connections are no process's but the one's that made them
            with watched(study.storage, count, own):
                study.work(begun)

        return worker

    children = [fork(run(first, Count((at,), die))), fork(run(second, Count((), die)))]
    for end in ends:
        os.close(end)
    survived, went_on = (ended_well(child) for child in children)
    assert went_on
    return survived
