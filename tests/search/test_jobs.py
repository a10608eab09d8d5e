"""Jobs beside trials: each done once, whatever becomes of who is at it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from nas_kd.errors import OutputError, TrainingError
from nas_kd.search import workers
from nas_kd.search.jobs import Notes, do_jobs, done_jobs, open_jobs, post_jobs, remove_jobs
from nas_kd.search.storage import close_storage, open_storage, sqlite_url
from nas_kd.search.workers import WORKER, RetryingStudy, worker_name


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[BaseStorage]:
    opened = open_storage(sqlite_url(tmp_path / "study.db"))
    yield opened
    close_storage(opened)


def states(jobs: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in jobs.get_trials(deepcopy=False)]


def score(key: str) -> tuple[float, Notes]:
    """The work: of a job that is named by a number."""
    return float(key), {"twice": 2 * float(key)}


def test_every_job_is_done_once_in_their_order(storage: BaseStorage) -> None:
    did: list[str] = []

    def run(key: str) -> tuple[float, Notes]:
        did.append(key)
        return score(key)

    jobs = post_jobs(storage, "s", ["3", "1", "2"])
    assert do_jobs(jobs, run, grace=60) == 3
    assert do_jobs(post_jobs(storage, "s", ["3", "1", "2", "4"]), run, grace=60) == 1  # posted again, with one more
    assert did == ["3", "1", "2", "4"]
    assert done_jobs(jobs)["2"]["twice"] == 4
    remove_jobs(storage, "s")
    assert open_jobs(storage, "s") is None


def test_jobs_of_another_plan_are_not_done(storage: BaseStorage) -> None:
    jobs = post_jobs(storage, "s", ["1", "2"])
    post_jobs(storage, "s", ["2", "3"])
    assert do_jobs(jobs, score, grace=60) == 2
    assert done_jobs(jobs).keys() == {"2", "3"}


def test_a_job_that_fails_by_itself_is_left_alone(storage: BaseStorage, caplog: pytest.LogCaptureFixture) -> None:
    def run(key: str) -> tuple[float, Notes]:
        if key == "1":
            raise TrainingError("the loss became nan")
        return score(key)

    jobs = post_jobs(storage, "s", ["1", "2"])
    assert do_jobs(jobs, run, grace=60) == 1
    assert "is left to the study's own command: the loss became nan" in caplog.text
    assert do_jobs(jobs, run, grace=60) == 0
    assert states(jobs) == [TrialState.FAIL, TrialState.COMPLETE]


@pytest.mark.parametrize("fault", ["signal", "disk"])
def test_what_ends_from_outside_is_put_back(storage: BaseStorage, fault: str) -> None:
    def run(key: str) -> tuple[float, Notes]:
        if fault == "disk":
            raise OutputError("no space left on device")
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    jobs = post_jobs(storage, "s", ["1"])
    with pytest.raises((KeyboardInterrupt, OutputError)):
        do_jobs(jobs, run, grace=60)
    assert states(jobs) == [TrialState.FAIL, TrialState.WAITING]
    assert do_jobs(jobs, score, grace=60) == 1


def test_a_silent_worker_loses_its_job_and_one_is_waited_for(storage: BaseStorage) -> None:
    jobs = post_jobs(storage, "s", ["1"])
    taken = jobs.take()
    assert taken is not None
    storage.set_trial_user_attr(taken, WORKER, "elsewhere-0000:1")
    looks = []

    def look(seconds: float) -> None:
        looks.append(states(jobs))

    assert do_jobs(jobs, score, grace=0, sleep=look) == 1
    assert looks[0] == [TrialState.RUNNING]
    assert states(jobs) == [TrialState.FAIL, TrialState.COMPLETE]


def test_who_waits_for_the_last_job_ends_when_all_are_put_away(storage: BaseStorage) -> None:
    jobs = post_jobs(storage, "s", ["1"])
    taken = jobs.take()
    assert taken is not None
    storage.set_trial_user_attr(taken, WORKER, "elsewhere-0000:1")
    assert do_jobs(jobs, score, grace=600, sleep=lambda seconds: remove_jobs(storage, "s")) == 0


def test_what_gets_the_number_of_jobs_that_were_put_away_is_no_job(storage: BaseStorage, tmp_path: Path) -> None:
    post_jobs(storage, "s", ["1"]).take()
    worker = open_storage(sqlite_url(tmp_path / "study.db"))  # another process
    jobs = open_jobs(worker, "s")
    assert jobs is not None
    other = list[optuna.Study]()

    def begin_another(seconds: float) -> None:
        remove_jobs(storage, "s")
        other.append(optuna.create_study(storage=storage, study_name="t"))
        other[0].enqueue_trial({"x": 1})

    assert do_jobs(jobs, score, grace=600, sleep=begin_another) == 0
    assert other[0]._study_id == jobs._study_id
    assert states(other[0]) == [TrialState.WAITING]
    close_storage(worker)


def test_a_job_that_another_has_just_taken_stays_its_own(storage: BaseStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = post_jobs(storage, "s", ["1"])
    waiting = jobs.get_trials(states=(TrialState.WAITING,))
    taken = jobs.take()
    assert taken is not None
    late = RetryingStudy(jobs.study_name, storage)
    monkeypatch.setattr(late, "get_trials", lambda **_: waiting)  # it looked before that
    monkeypatch.setattr(workers, "worker_name", lambda: "elsewhere-0000:1")
    assert late.take() is None
    assert jobs.get_trials()[0].user_attrs[WORKER] != "elsewhere-0000:1"


def test_a_job_that_two_have_signed_is_signed_again_by_who_is_at_it(storage: BaseStorage) -> None:
    jobs = post_jobs(storage, "s", ["1"])
    seen = list[str]()

    def run(key: str) -> tuple[float, Notes]:
        taken = jobs.get_trials()[0]
        storage.set_trial_user_attr(taken._trial_id, WORKER, "elsewhere-0000:1")
        while (name := jobs.get_trials()[0].user_attrs[WORKER]) == "elsewhere-0000:1":
            time.sleep(0.01)
        seen.append(name)
        return score(key)

    assert do_jobs(jobs, run, grace=0.4) == 1
    assert seen == [worker_name()]


def test_a_bug_is_no_job_that_failed(storage: BaseStorage) -> None:
    def run(key: str) -> tuple[float, Notes]:
        return score({}[key])

    with pytest.raises(KeyError):
        do_jobs(post_jobs(storage, "s", ["1"]), run, grace=60)
