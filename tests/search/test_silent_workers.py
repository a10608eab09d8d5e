"""Trials of workers that died or fell silent, in memory and by a clock of our own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from nas_kd.errors import StudyError
from nas_kd.search.sampler import make_optuna_sampler
from nas_kd.search.storage import CONFIG, close_storage, open_storage, open_study, set_aside, sqlite_url
from nas_kd.search.workers import (
    BEAT,
    GENOTYPE,
    MAX_RETRIES,
    RETRIES,
    RETRY,
    WORKER,
    Watch,
    beating,
    give_up,
    release_own_trials,
    requeue,
    worker_name,
)


class Clock:
    """A clock that goes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study()


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[BaseStorage]:
    storage = open_storage(sqlite_url(tmp_path / "study.db"))
    yield storage
    close_storage(storage)


def begin(study: optuna.Study, worker: str = "elsewhere-0000:1") -> optuna.Trial:
    trial = study.ask()
    trial.set_user_attr(WORKER, worker)
    trial.suggest_int("x", 0, 9)
    trial.set_user_attr(GENOTYPE, "all that it was to do is known")
    return trial


def frozen(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial:
    return study.get_trials()[trial.number]


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.get_trials()]


def test_who_stands_still_for_too_long_is_retried(study: optuna.Study) -> None:
    clock = Clock()
    watch = Watch(grace=10, clock=clock)
    alive, dead = begin(study), begin(study)
    for beat in range(4):
        alive.set_user_attr(BEAT, beat)
        assert watch.retry_silent_trials(study) == (beat == 3)
        clock.now += 4 if beat < 2 else 3
    assert states(study) == [TrialState.RUNNING, TrialState.FAIL, TrialState.WAITING]
    assert study.get_trials()[2].user_attrs == {"source": "sampler", RETRY: dead.number, RETRIES: 1}


def test_clocks_that_differ_between_workers_do_no_harm(study: optuna.Study) -> None:
    """A watcher whose clock is years ahead sees the same beats."""
    clock = Clock()
    clock.now = 3e8
    watch = Watch(grace=10, clock=clock)
    alive = begin(study)
    for beat in range(5):
        alive.set_user_attr(BEAT, beat)
        assert watch.retry_silent_trials(study) == 0
        clock.now += 9


def test_a_worker_that_died_before_it_said_anything_is_found(study: optuna.Study) -> None:
    clock = Clock()
    watch = Watch(grace=10, clock=clock)
    study.ask()
    assert watch.retry_silent_trials(study) == 0
    clock.now = 11
    assert watch.retry_silent_trials(study) == 1
    assert states(study) == [TrialState.FAIL]  # it had nothing to do yet


def test_what_kills_every_worker_is_given_up(study: optuna.Study) -> None:
    study.enqueue_trial({"x": 3})
    for _ in range(MAX_RETRIES + 1):
        assert give_up(study, frozen(study, begin(study)))
    assert states(study) == [TrialState.FAIL] * (MAX_RETRIES + 1)


def test_two_who_find_the_same_dead_worker_retry_its_trial_once(study: optuna.Study) -> None:
    dead = frozen(study, begin(study))
    assert [give_up(study, dead), give_up(study, dead)] == [True, False]
    assert states(study) == [TrialState.FAIL, TrialState.WAITING]


def test_a_retry_keeps_what_its_rungs_showed_and_an_interruption_is_no_death(study: optuna.Study) -> None:
    trial = begin(study, worker_name())
    trial.set_user_attr("rung/1", 0.5)
    trial.set_user_attr("digest", "d")
    assert release_own_trials(study) == 1
    again = study.get_trials()[1]
    assert again.user_attrs == {"source": "sampler", "rung/1": 0.5, RETRY: 0, RETRIES: 0}
    assert again.system_attrs["fixed_params"] == {"x": trial.params["x"]}


def test_a_retry_that_is_retried_keeps_its_point(study: optuna.Study) -> None:
    study.enqueue_trial({"x": 7})
    requeue(study, frozen(study, begin(study)))
    assert begin(study).params == {"x": 7}


def test_what_is_retried_comes_before_all_that_waits(storage: BaseStorage) -> None:
    study = open_study(storage, "s", directions=["maximize"], config={}, sampler=make_optuna_sampler("random", 0))
    for x in range(4):
        study.enqueue_trial({"x": x})
    asked = []

    def objective(trial: optuna.Trial) -> float:
        asked.append(trial.suggest_int("x", 0, 9))
        if len(asked) == 1:
            requeue(study, study.get_trials()[trial.number])
        return 0.0

    study.optimize(objective, n_trials=5)
    assert asked == [0, 0, 1, 2, 3]
    assert [trial.number for trial in study.get_trials() if RETRY in trial.user_attrs] == [4]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")  # optuna: ask without optimize
def test_of_two_workers_one_takes_what_is_retried(storage: BaseStorage) -> None:
    study = open_study(storage, "s", directions=["maximize"], config={}, sampler=make_optuna_sampler("random", 0))
    study.enqueue_trial({"x": 1})
    study.enqueue_trial({"x": 2}, user_attrs={RETRY: 0})
    taken: list[int] = []
    barrier = threading.Barrier(2)

    def take() -> None:
        barrier.wait()
        taken.append(study.ask().suggest_int("x", 0, 9))

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [1, 2]


def test_a_worker_counts_its_beat_up(study: optuna.Study) -> None:
    trial = begin(study)
    with beating(trial, 0.01):
        stop = threading.Event()
        while study.get_trials()[0].user_attrs.get(BEAT, 0) < 3:
            stop.wait(0.01)


def test_of_two_different_commands_at_once_one_is_refused(storage: BaseStorage) -> None:
    """Neither may overwrite what the other noted, in whatever order they come."""
    errors: list[StudyError] = []
    barrier = threading.Barrier(2)

    def run(seed: int) -> None:
        barrier.wait()
        try:
            sampler = make_optuna_sampler("random", 0)
            open_study(storage, "s", directions=["maximize"], config={"seed": seed}, sampler=sampler)
        except StudyError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (error,) = errors
    assert "was begun with seed" in str(error)
    assert optuna.load_study(study_name="s", storage=storage).user_attrs[CONFIG]["seed"] in (1, 2)


@pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")  # optuna: ask without optimize
def test_a_study_with_workers_is_not_set_aside(storage: BaseStorage) -> None:
    assert set_aside(storage, "s") == ""
    study = optuna.create_study(storage=storage, study_name="s")
    begin(study)
    with pytest.raises(StudyError, match="1 trials of the study 's' are running"):
        set_aside(storage, "s")
