"""What the command that watches its workers reads of their trials."""

from __future__ import annotations

import io
import logging
import os
import signal

import optuna
import pytest
from injection import ended_well, fork
from optuna.trial import TrialState, create_trial

from nas_kd.progress import Stages, console_for
from nas_kd.search.workers import RETRIES, RETRY, WORKER, worker_name
from nas_kd.workers.pool import LocalWorker, WorkerPool, line_of, run_pool


def test_a_trial_that_notes_its_costs_just_now_is_shown_without_them() -> None:
    """Each attribute is a transaction of its own: between two of them a part is there."""
    study = optuna.create_study()
    trial = study.ask()
    trial.set_user_attr("params", 1_000)
    (found,) = study.get_trials()
    assert line_of(found, epochs=4).words == "trial 0"
    trial.set_user_attr("macs", 2_000)
    (found,) = study.get_trials()
    assert line_of(found, epochs=4).words == "trial 0, 1K"


class TooSlow:
    """A worker that is killed as it does not stop in time: its trial stays as it was."""

    def __init__(self, study: optuna.Study) -> None:
        self.study, self.was_killed = study, False

    def start(self) -> None:
        child = fork(lambda: None)
        assert ended_well(child)
        self.study.enqueue_trial({"x": 3})
        trial = self.study.ask()
        trial.set_user_attr(WORKER, f"{worker_name().rpartition(':')[0]}:{child}")
        trial.set_user_attr("rung/1", 0.5)

    def code(self) -> int | None:
        return -signal.SIGKILL if self.was_killed else None

    def words(self) -> str:
        return "SIGKILL"

    def ask_to_stop(self) -> None:
        pass

    def wait(self, seconds: float) -> None:
        self.was_killed = True


def test_a_worker_that_is_killed_is_told_of_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    study, worker = optuna.create_study(), LocalWorker([], dict(os.environ))
    started: list[int] = []

    def look(seconds: float) -> None:
        assert worker.process is not None
        started.append(worker.process.pid)
        if len(started) == 1:
            worker.process.kill()
            worker.process.wait()
        else:
            study.add_trial(create_trial(value=0.5, constraints={"rung": 0.0}))

    pool = WorkerPool(workers=(worker,), trials=1, epochs=2, grace=120)
    with Stages(console_for(io.StringIO()), quiet=True).board("search", 1) as board, caplog.at_level(logging.WARNING):
        run_pool(pool, study, board, sleep=look)
    assert "a worker died (SIGKILL): its trial goes to another one" in caplog.text
    assert len(set(started)) == len(started) == 2
    assert worker.code() is not None


def test_what_a_worker_was_too_slow_to_put_back_is_put_back_for_it() -> None:
    study = optuna.create_study()

    def ctrl_c(seconds: float) -> None:
        raise KeyboardInterrupt

    pool = WorkerPool(workers=(TooSlow(study),), trials=1, epochs=2, grace=120)
    with Stages(console_for(io.StringIO()), quiet=True).board("search", 1) as board:
        with pytest.raises(KeyboardInterrupt):
            run_pool(pool, study, board, sleep=ctrl_c)
    assert [trial.state for trial in study.get_trials()] == [TrialState.FAIL, TrialState.WAITING]
    assert study.get_trials()[1].user_attrs == {"source": "sampler", "rung/1": 0.5, RETRY: 0, RETRIES: 0}
