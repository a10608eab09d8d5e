"""Where a study lives: an Optuna storage that survives a kill, and the configuration that it was begun with."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy.exc import SQLAlchemyError

from nas_kd.errors import OutputError, StudyError

Direction = Literal["minimize", "maximize"]
CONFIG = "nas_kd"  # the study's user attribute that holds what it was begun with
_HEARTBEAT = 30  # seconds; a trial that was silent for four of them is dead and retried
_logger = logging.getLogger(__name__)


def sqlite_url(path: Path) -> str:
    """The storage URL of a SQLite file."""
    return f"sqlite:///{path}"


def open_storage(url: str) -> BaseStorage:
    """Opens or creates an Optuna storage. Raises OutputError when it cannot be reached or written."""
    wal = url.startswith("sqlite")
    try:
        storage = RDBStorage(
            url,
            heartbeat_interval=_HEARTBEAT,
            grace_period=4 * _HEARTBEAT,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=2),
            engine_kwargs={"connect_args": {"timeout": 60}} if wal else None,
        )
    except (SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
        raise OutputError(f"cannot open the storage {url}: {_reason(error)}") from error
    if wal:
        _use_wal(storage)
    return storage


def _use_wal(storage: RDBStorage) -> None:
    """SQLite's write-ahead log: every suggested parameter is a transaction, and readers do not block them."""

    def prepare(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    sqlalchemy.event.listen(storage.engine, "connect", prepare)
    storage.engine.dispose()


def _reason(error: Exception) -> str:
    cause: BaseException = getattr(error, "orig", None) or error
    text = str(cause).strip().splitlines() or [type(cause).__name__]
    return text[0][:200]


def open_study(
    storage: BaseStorage,
    name: str,
    *,
    directions: Sequence[Direction],
    config: Mapping[str, Any],
    sampler: optuna.samplers.BaseSampler,
) -> optuna.Study:
    """Creates a study, or goes on with the one of this name if it was begun with the same `config` (JSON values).

    Raises StudyError, and says what changed, when it was not.
    """
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=directions,
            sampler=sampler,
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        begun = study.user_attrs.get(CONFIG)
        if begun is None and study.trials:
            raise StudyError(f"the study {name!r} in this storage was not made by nas_kd: choose another --study-name")
        if begun is None:
            study.set_user_attr(CONFIG, json.loads(json.dumps(config)))
        else:
            _check_config(name, begun, json.loads(json.dumps(config)))
    except SQLAlchemyError as error:
        raise OutputError(f"cannot use the study {name!r} in its storage: {_reason(error)}") from error
    except optuna.exceptions.StorageInternalError as error:
        raise OutputError(f"cannot write the study {name!r}: {_reason(error)}") from error
    if [direction.name.lower() for direction in study.directions] != list(directions):
        raise StudyError(f"the study {name!r} has other objectives: choose another --study-name")
    return study


def _check_config(name: str, begun: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    changed = [key for key in sorted({*begun, *config}) if begun.get(key) != config.get(key)]
    if changed:
        key = changed[0]
        more = f" (and {', '.join(changed[1:])})" if len(changed) > 1 else ""
        raise StudyError(
            f"the study {name!r} was begun with {key} {begun.get(key)!r}, not {config.get(key)!r}{more}: "
            "its trials cannot be compared; choose another --study-name or --out"
        )


def dead_trials_first(study: optuna.Study) -> int:
    """Sends trials that an earlier, killed run of this machine left behind to be retried; returns how many wait."""
    optuna.storages.fail_stale_trials(study)
    return len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))
