"""Where a study lives: an Optuna storage that survives a kill, and the configuration that it was begun with."""

from __future__ import annotations

import datetime
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from nas_kd.errors import OutputError, StudyError, without_password
from nas_kd.search.workers import GRACE, RetryingStudy, requeue, running

Direction = Literal["minimize", "maximize"]
CONFIG = "nas_kd"  # the study's user attribute that holds what it was begun with
PROXY = "grpc://"  # how the URL of Optuna's gRPC proxy begins
_PROXY_SECONDS = 30  # to wait until a proxy answers
_ATTEMPTS, _PAUSE = 5, 0.2  # to open a database whose tables another is making, and seconds between two
_LONG = 200  # characters of two values together, from which on only their difference is shown
_CREATOR_SECONDS = 5.0  # to wait until who created a study has said what it is


def sqlite_url(path: Path) -> str:
    """The storage URL of a SQLite file. Raises OutputError for a path that no URL of SQLAlchemy's can say."""
    plain = f"sqlite:///{path}"
    for url in (plain, re.sub(r"[%?#{}]", lambda match: f"%{ord(match[0]):02X}", plain)):
        with suppress(KeyError, ValueError, IndexError):  # Optuna writes its version where there are braces
            if sqlalchemy.make_url(url.format(SCHEMA_VERSION="")).database == str(path):
                return url
    raise OutputError(f"SQLite cannot keep a study in {path}: choose an --out without ?, %, {{ and }}")


def open_storage(url: str, *, grace: float = GRACE) -> BaseStorage:
    """Opens or creates an Optuna storage; `grpc://HOST:PORT` is a proxy in front of one. A trial whose worker is silent
    for `grace` seconds will be retried. Raises OutputError when it cannot be reached or written."""
    if url.startswith(PROXY):
        return _open_proxy(url)
    try:
        storage = _open_database(url, grace)
    except (SQLAlchemyError, StorageInternalError, ImportError, ValueError, RuntimeError) as error:
        foreign = "; is it a database of another program?" if isinstance(error, StorageInternalError) else ""
        raise OutputError(f"cannot open the storage {without_password(url)}: {reason(error)}{foreign}") from error
    if url.startswith("sqlite"):
        _make_sqlite_safe(storage)
    return storage


def _open_database(url: str, grace: float) -> RDBStorage:
    """Optuna's storage in a database. Who comes first makes its tables; who comes at the same moment tries again."""
    attempt = 0
    while True:
        attempt += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # optuna: heartbeat
                return RDBStorage(
                    url,
                    heartbeat_interval=max(1, int(grace) // 4),
                    grace_period=max(2, int(grace)),
                    heartbeat_stale_trial_callback=requeue,
                    engine_kwargs=_engine_arguments(url),
                )
        except (SQLAlchemyError, StorageInternalError) as error:
            if attempt == _ATTEMPTS or not re.search(
                "already exists|unique constraint|duplicate key", reason(error), re.IGNORECASE
            ):
                raise
            time.sleep(_PAUSE * attempt)


def _engine_arguments(url: str) -> dict[str, Any] | None:
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": 60}}
    if url.startswith("postgresql"):  # a connection that a restarted server has forgotten is made again
        return {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}
    return None


def _open_proxy(url: str) -> BaseStorage:
    host, _, port = url.removeprefix(PROXY).rstrip("/").rpartition(":")
    if not host or not port.isdecimal():
        raise OutputError(f"cannot open the storage {url}: write a proxy's address like {PROXY}HOST:PORT")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            proxy = optuna.storages.GrpcStorageProxy(host=host.strip("[]"), port=int(port))
            proxy.wait_server_ready(timeout=_PROXY_SECONDS)
    except ImportError as error:
        raise OutputError(f"cannot open the storage {url}: pip install grpcio protobuf") from error
    except ConnectionError as error:
        raise OutputError(f"cannot open the storage {url}: nobody answered for {_PROXY_SECONDS} s") from error
    return proxy


def close_storage(storage: BaseStorage) -> None:
    """Gives back the connections of a storage."""
    with suppress(Exception):  # nothing is lost with them
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()
        elif isinstance(storage, optuna.storages.GrpcStorageProxy):
            storage.close()


def _make_sqlite_safe(storage: RDBStorage) -> None:
    """Its write-ahead log, since every suggested parameter is a transaction; and transactions one after the other: left
    to itself Python's driver begins them at the first write, and two workers that read a waiting trial both take it."""

    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(storage.engine, "connect", prepare)
    sqlalchemy.event.listen(storage.engine, "begin", begin)
    storage.engine.dispose()


def reason(error: BaseException) -> str:
    """Why a storage failed, in one line."""
    cause: Any = error
    while cause.__cause__ is not None and isinstance(cause, StorageInternalError):
        cause = cause.__cause__
    cause = getattr(cause, "orig", None) or cause
    text = (cause.details() if _is_proxy_error(cause) else str(cause)) or ""
    line = (text.strip().splitlines() or [type(cause).__name__])[0][:200]
    return f"{line}; is the disk full?" if "disk I/O error" in line else line


def _is_proxy_error(error: BaseException) -> bool:
    return hasattr(error, "details") and type(error).__module__.startswith("grpc")


def is_storage_error(error: BaseException) -> bool:
    """Whether an error came from the storage: a database or proxy that cannot be reached or written."""
    return isinstance(error, SQLAlchemyError | StorageInternalError) or _is_proxy_error(error)


@contextmanager
def using_storage(url: str, grace: float, what: str) -> Iterator[BaseStorage]:
    """A storage that is open while the block runs; what it raises there is told as by `storage_errors`."""
    storage = open_storage(url, grace=grace)
    try:
        with storage_errors(what):
            yield storage
    finally:
        close_storage(storage)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turns what a database or proxy raises inside the block into an OutputError: `what` failed, and why."""
    try:
        yield
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise OutputError(f"cannot {what}: {reason(error)}") from error


def open_study(
    storage: BaseStorage,
    name: str,
    *,
    directions: Sequence[Direction],
    config: Mapping[str, Any],
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner | None = None,
) -> optuna.Study:
    """Creates a study, or goes on with the one of this name if it was begun with the same `config` (JSON values).

    Of several processes that open it at once, one creates it. Raises StudyError, and says what changed, when it was
    begun with something else.
    """
    with storage_errors(f"use the study {name!r} in its storage"):
        created = _create(storage, name, directions)
        study = RetryingStudy(name, storage, sampler, pruner or optuna.pruners.NopPruner())
        if [direction.name.lower() for direction in study.directions] != list(directions):
            raise StudyError(f"the study {name!r} has other objectives: choose another --study-name")
        if not created:
            _wait_for_creator(study)
        begun = _begun_with(study)
        if begun is None:
            study.set_user_attr(CONFIG, _plain(config))
        else:
            _check_config(name, begun, _plain(config))
    return study


def _create(storage: BaseStorage, name: str, directions: Sequence[Direction]) -> bool:
    """Creates a study unless it is there, and returns whether it is new."""
    try:
        optuna.create_study(storage=storage, study_name=name, directions=directions)
    except DuplicatedStudyError:
        return False
    return True


def _wait_for_creator(study: optuna.Study) -> None:
    """Until who created a study just now has said what it is; one that stays silent was killed before it could."""
    deadline = time.monotonic() + _CREATOR_SECONDS
    while CONFIG not in study.user_attrs and not study.get_trials(deepcopy=False) and time.monotonic() < deadline:
        time.sleep(0.1)


def check_study(storage: BaseStorage, name: str, config: Mapping[str, Any]) -> None:
    """Raises StudyError when the study of this name, if there is one, was not made by nas_kd or was begun with other
    values of `config`, which may be a part of its configuration: known before anything is trained."""
    with storage_errors(f"use the study {name!r} in its storage"):
        if name in optuna.get_all_study_names(storage):
            begun = _begun_with(optuna.load_study(study_name=name, storage=storage))
            if begun is not None:
                _check_config(name, {key: begun.get(key) for key in config}, _plain(config))


def begun_study(storage: BaseStorage, name: str) -> dict[str, Any] | None:
    """The user attributes of the study of this name; None where there is none, or none that was begun."""
    with storage_errors(f"use the study {name!r} in its storage"):
        if name not in optuna.get_all_study_names(storage):
            return None
        attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
    return attributes if CONFIG in attributes else None


def _begun_with(study: optuna.Study) -> dict[str, Any] | None:
    begun: dict[str, Any] | None = study.user_attrs.get(CONFIG)
    if begun is None and (study.user_attrs or study.get_trials(deepcopy=False)):
        raise StudyError(
            f"the study {study.study_name!r} in this storage was not made by nas_kd: choose another --study-name"
        )
    return begun


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


def _check_config(name: str, begun: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    # what follows from something else comes last
    keys = sorted({*begun, *config}, key=lambda key: (key != "version", key == "library", key))
    changed = [key for key in keys if begun.get(key) != config.get(key)]
    if changed:
        key = changed[0]
        more = f" (and {', '.join(changed[1:])})" if len(changed) > 1 else ""
        before, now = _apart(begun.get(key), config.get(key))
        raise StudyError(
            f"the study {name!r} was begun with {key} {before}, not {now}{more}: "
            "its trials cannot be compared; choose another --study-name or --out, or start over with --new-study"
        )


def _apart(before: Any, now: Any) -> tuple[str, str]:
    """Two values as they are shown; of two long texts, such as recipes, the parts that differ."""
    if not (isinstance(before, str) and isinstance(now, str) and len(before) + len(now) > _LONG):
        return repr(before), repr(now)
    parts = [re.split(r", |\(", text) for text in (before, now)]
    one, other = (", ".join(part for part in parts[i] if part not in parts[1 - i]) for i in (0, 1))
    return one or repr(before), other or repr(now)


def set_aside(storage: BaseStorage, name: str, now: Callable[[], datetime.datetime] = datetime.datetime.now) -> str:
    """Renames the study of this name, so that another can begin under it, and returns the new name; nothing is lost.

    Empty when there is none. Raises StudyError while workers are at it.
    """
    with storage_errors(f"set the study {name!r} aside"):
        if name not in optuna.get_all_study_names(storage):
            return ""
        old = optuna.load_study(study_name=name, storage=storage)
        if busy := running(old):
            raise StudyError(
                f"{len(busy)} trials of the study {name!r} are running: stop its workers before --new-study, or wait "
                "until they are found dead"
            )
        kept = f"{name} until {now():%Y-%m-%d %H:%M:%S}"
        optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=kept)
        optuna.delete_study(study_name=name, storage=storage)
    return kept
