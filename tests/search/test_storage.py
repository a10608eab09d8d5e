from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage

from nas_kd.errors import OutputError, StudyError
from nas_kd.search.sampler import make_optuna_sampler
from nas_kd.search.storage import close_storage, open_storage, open_study, reason, sqlite_url
from nas_kd.search.trials import DIRECTIONS

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # optuna: heartbeat


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[BaseStorage]:
    storage = open_storage(sqlite_url(tmp_path / "study.db"))
    yield storage
    assert isinstance(storage, RDBStorage)
    storage.remove_session()
    storage.engine.dispose()


def study(storage: BaseStorage, name: str = "s", **config: Any) -> optuna.Study:
    return open_study(storage, name, directions=DIRECTIONS, config=config, sampler=make_optuna_sampler("random", 0))


def test_sqlite_keeps_a_write_ahead_log(storage: BaseStorage, tmp_path: Path) -> None:
    study(storage, a=1)
    with closing(sqlite3.connect(tmp_path / "study.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_same_configuration_goes_on(storage: BaseStorage) -> None:
    first = study(storage, model="resnet18", pin=("a",), epochs=1)
    first.add_trial(optuna.trial.create_trial(values=[0.5, 1, 1]))
    again = study(storage, model="resnet18", pin=["a"], epochs=1)
    assert len(again.trials) == 1
    assert [direction.name.lower() for direction in again.directions] == list(DIRECTIONS)


def test_another_configuration_is_refused_in_one_line_that_says_what_changed(storage: BaseStorage) -> None:
    study(storage, model="resnet18", budget="params=1M", seed=0)
    with pytest.raises(StudyError, match=r"begun with budget 'params=1M', not 'params=2M'.*choose another") as caught:
        study(storage, model="resnet18", budget="params=2M", seed=0)
    assert "\n" not in str(caught.value)
    with pytest.raises(StudyError, match=r"\(and seed\)"):
        study(storage, model="resnet18", budget="params=2M", seed=1)
    study(storage, "other", model="resnet18", budget="params=2M", seed=0)


def test_of_long_values_the_difference_is_shown(storage: BaseStorage) -> None:
    same = ", ".join(f"value{index}={index}" for index in range(30))
    study(storage, proxy=f"Recipe(epochs=2, {same})")
    with pytest.raises(StudyError, match="was begun with proxy epochs=2, not epochs=4: its trials"):
        study(storage, proxy=f"Recipe(epochs=4, {same})")


def test_a_foreign_study_is_refused(storage: BaseStorage) -> None:
    foreign = optuna.create_study(storage=storage, study_name="mine", directions=DIRECTIONS)
    foreign.add_trial(optuna.trial.create_trial(values=[0.5, 1, 1]))
    with pytest.raises(StudyError, match="'mine' in this storage was not made by nas_kd"):
        study(storage, "mine", a=1)
    assert "nas_kd" not in optuna.load_study(storage=storage, study_name="mine").user_attrs


def test_a_foreign_study_that_is_empty_is_refused_too(storage: BaseStorage) -> None:
    foreign = optuna.create_study(storage=storage, study_name="mine", directions=DIRECTIONS)
    foreign.set_user_attr("by", "another tool")
    with pytest.raises(StudyError, match="'mine' in this storage was not made by nas_kd"):
        study(storage, "mine", a=1)


def test_a_database_of_another_program_is_one_line(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as database:
        database.execute("CREATE TABLE version_info (version INTEGER)")
    with pytest.raises(OutputError, match=r"no such column.*is it a database of another program") as caught:
        open_storage(sqlite_url(tmp_path / "other.db"))
    assert "\n" not in str(caught.value)


def test_several_who_open_a_new_database_at_once_all_get_it(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def open_one(index: int) -> str:
        barrier.wait()
        storage = open_storage(sqlite_url(tmp_path / "study.db"))
        name = optuna.create_study(storage=storage, study_name=f"s{index}").study_name
        close_storage(storage)
        return name

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(open_one, range(4))) == ["s0", "s1", "s2", "s3"]


def test_other_objectives_are_refused(storage: BaseStorage) -> None:
    optuna.create_study(storage=storage, study_name="one", direction="maximize")
    with pytest.raises(StudyError, match="'one' has other objectives"):
        study(storage, "one", a=1)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////nonexistent/folder/study.db",
        "nonsense",
        "nosuchdb://user@localhost/x",
        "postgresql+psycopg://nobody@127.0.0.1:1/x",
    ],
)
def test_a_storage_that_cannot_be_reached_is_one_line(url: str) -> None:
    with pytest.raises(OutputError, match="cannot open the storage") as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"this is no database, it is a text file of some length" * 100)
    with pytest.raises(OutputError, match="cannot open the storage") as caught:
        open_storage(sqlite_url(tmp_path / "study.db"))
    assert "\n" not in str(caught.value)


def test_of_many_workers_one_takes_a_waiting_trial(storage: BaseStorage, tmp_path: Path) -> None:
    """Each with a connection of its own, as processes have."""
    study(storage)
    storages = [open_storage(sqlite_url(tmp_path / "study.db")) for _ in range(4)]
    ours = optuna.load_study(study_name="s", storage=storage)
    barrier = threading.Barrier(len(storages))

    def take(other: BaseStorage, trial: int) -> bool:
        barrier.wait()
        try:
            return other.set_trial_state_values(trial, state=optuna.trial.TrialState.RUNNING)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    with ThreadPoolExecutor(len(storages)) as pool:
        for number in range(12):
            ours.enqueue_trial({"x": number})
            trial = ours.get_trials()[-1]._trial_id
            assert sum(pool.map(take, storages, [trial] * len(storages))) == 1
    for other in storages:
        close_storage(other)


def test_a_full_disk_is_guessed_at() -> None:
    said = sqlalchemy.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("disk I/O error"))
    assert reason(said) == "disk I/O error; is the disk full?"
