"""A database or disk that cannot be written any more in the middle of a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from nas_kd.errors import OutputError
from nas_kd.search.claims import RUNG
from nas_kd.search.sampler import make_optuna_sampler
from nas_kd.search.storage import close_storage, open_storage, open_study, reason, sqlite_url, storage_errors
from nas_kd.search.work import run_trials
from nas_kd.search.workers import RETRIES, RETRY, WORKER, retry_dead_trials, worker_name

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # optuna: heartbeat


class Database:
    """A SQLite storage that can be made read-only, as a full disk makes it."""

    def __init__(self, url: str) -> None:
        storage = open_storage(url)
        assert isinstance(storage, RDBStorage)
        self.storage, self.read_only = storage, False
        sqlalchemy.event.listen(storage.engine, "connect", self._prepare)

    def _prepare(self, connection: Any, record: Any) -> None:
        connection.execute(f"PRAGMA query_only={int(self.read_only)}")

    def lock(self, read_only: bool) -> None:
        self.read_only = read_only
        self.storage.remove_session()
        self.storage.engine.dispose()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(sqlite_url(tmp_path / "study.db"))
    yield database
    close_storage(database.storage)


def new_study(database: Database) -> optuna.Study:
    sampler = make_optuna_sampler("random", 0)
    study = open_study(database.storage, "s", directions=["maximize"], config={}, sampler=sampler)
    study.enqueue_trial({"x": 3})
    return study


def objective(before_end: Callable[[optuna.Trial], None]) -> Any:
    """What a trial notes, and something that goes wrong before its end."""

    def run(trial: optuna.Trial) -> float:
        trial.set_user_attr(WORKER, worker_name())
        trial.suggest_int("x", 0, 9)
        trial.set_user_attr("rung/1", 0.5)
        trial.set_constraint(RUNG, 0.0)
        before_end(trial)
        return 1.0

    return run


def test_a_trial_that_cannot_be_ended_is_one_line_and_is_done_again(database: Database) -> None:
    study = new_study(database)
    with pytest.raises(OutputError, match="cannot use the study: attempt to write a readonly database"):
        with storage_errors("use the study"):
            run_trials(study, objective(lambda trial: database.lock(True)), trained=1)
    database.lock(False)
    (left,) = study.get_trials()
    assert left.state == TrialState.RUNNING
    study._storage.set_trial_user_attr(left._trial_id, WORKER, f"{worker_name().rpartition(':')[0]}:{2**22 + 1}")
    assert retry_dead_trials(study) == 1  # its process is gone
    run_trials(study, objective(lambda trial: None), trained=1)
    assert [trial.state for trial in study.get_trials()] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.get_trials()[1].params == {"x": 3}


def test_a_disk_that_is_full_is_no_failure_of_the_trial(database: Database) -> None:
    study = new_study(database)

    def fill(trial: optuna.Trial) -> None:
        raise OutputError("cannot write it: no space left on device")

    with pytest.raises(OutputError, match="no space left"):
        run_trials(study, objective(fill), trained=1)
    failed, again = study.get_trials()
    assert (failed.state, again.state) == (TrialState.FAIL, TrialState.WAITING)
    assert again.user_attrs == {"source": "sampler", "rung/1": 0.5, RETRY: 0, RETRIES: 0}


def test_a_bug_is_not_done_again(database: Database) -> None:
    study = new_study(database)

    def fail(trial: optuna.Trial) -> None:
        raise LookupError("a bug")

    with pytest.raises(LookupError):
        run_trials(study, objective(fail), trained=1)
    assert [trial.state for trial in study.get_trials()] == [TrialState.FAIL]


def test_a_storage_error_is_told_in_one_line(database: Database) -> None:
    study = new_study(database)
    database.lock(True)
    with pytest.raises(Exception, match="commit") as caught:
        study.set_user_attr("a", 1)
    assert reason(caught.value) == "attempt to write a readonly database"
