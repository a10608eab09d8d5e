"""Where a study lives: an Optuna storage that survives a kill, and the configuration that it was begun with."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from nas_kd.errors import OutputError, StudyError

Direction = Literal["minimize", "maximize"]
CONFIG = "nas_kd"  # the study's user attribute that holds what it was begun with
WORKER = "worker"  # the user attribute of a trial that names the process which runs it
_HEARTBEAT = 30  # seconds; a trial that was silent for four of them is dead and retried


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
        begun = _begun_with(study)
        if begun is None:
            study.set_user_attr(CONFIG, _plain(config))
        else:
            _check_config(name, begun, _plain(config))
    except SQLAlchemyError as error:
        raise OutputError(f"cannot use the study {name!r} in its storage: {_reason(error)}") from error
    except optuna.exceptions.StorageInternalError as error:
        raise OutputError(f"cannot write the study {name!r}: {_reason(error)}") from error
    if [direction.name.lower() for direction in study.directions] != list(directions):
        raise StudyError(f"the study {name!r} has other objectives: choose another --study-name")
    return study


def check_study(storage: BaseStorage, name: str, config: Mapping[str, Any]) -> None:
    """Raises StudyError when the study of this name, if there is one, was not made by nas_kd or was begun with other
    values of `config`, which may be a part of its configuration: known before anything is trained."""
    if name in optuna.get_all_study_names(storage):
        begun = _begun_with(optuna.load_study(study_name=name, storage=storage))
        if begun is not None:
            _check_config(name, {key: begun.get(key) for key in config}, _plain(config))


def _begun_with(study: optuna.Study) -> dict[str, Any] | None:
    begun: dict[str, Any] | None = study.user_attrs.get(CONFIG)
    if begun is None and study.get_trials(deepcopy=False):
        raise StudyError(
            f"the study {study.study_name!r} in this storage was not made by nas_kd: choose another --study-name"
        )
    return begun


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


def _check_config(name: str, begun: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    changed = [key for key in sorted({*begun, *config}) if begun.get(key) != config.get(key)]
    if changed:
        key = changed[0]
        more = f" (and {', '.join(changed[1:])})" if len(changed) > 1 else ""
        raise StudyError(
            f"the study {name!r} was begun with {key} {begun.get(key)!r}, not {config.get(key)!r}{more}: "
            "its trials cannot be compared; choose another --study-name or --out"
        )


def worker_name() -> str:
    """Names this process among all that run trials of a study."""
    return f"{socket.gethostname()}:{os.getpid()}"


def retry_dead_trials(study: optuna.Study) -> int:
    """Queues the trials again that a killed run on this machine left behind, and returns how many.

    Those of other machines are found by their silent heartbeat, but only after minutes.
    """
    dead = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if _is_dead(trial)]
    for trial in dead:
        study.tell(trial.number, state=TrialState.FAIL)
        source = trial.user_attrs.get("source", "sampler")
        attributes = {"source": source, "retry of": trial.number}
        study.enqueue_trial(trial.system_attrs.get("fixed_params", trial.params), user_attrs=attributes)
    return len(dead)


def _is_dead(trial: FrozenTrial) -> bool:
    host, _, process = trial.user_attrs.get(WORKER, "").rpartition(":")
    if os.name != "posix" or host != socket.gethostname():
        return False
    try:
        os.kill(int(process), 0)  # sends nothing: asks whether the process is there
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
