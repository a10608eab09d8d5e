"""Where a study lives and who shares its work: the arguments, and the value that holds them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

from nas_kd.arguments.parsing import number, path, storage
from nas_kd.errors import NasKdError

STORAGE = "NAS_KD_STORAGE"  # environment variable: a URL with a password is not for every eye on the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingSettings:
    """The storage of a study (None: a file in its folder), where its files are for others, and the processes that do
    its work."""

    storage: str | None = None
    artifacts: str | None = None
    jobs: int = 1
    grace_period: int = 120
    new_study: bool = False


def add_storage(add: Callable[..., object]) -> None:
    """Where a study lives."""
    add(
        "--storage",
        type=storage,
        metavar="URL",
        help="Optuna storage: a URL, or a file for SQLite (study.db in the output folder, or $NAS_KD_STORAGE)",
    )


def storage_of_environment() -> str | None:
    """What $NAS_KD_STORAGE names. Raises NasKdError for what is no storage."""
    try:
        return storage(os.environ.get(STORAGE, "")) or None
    except argparse.ArgumentTypeError as error:
        raise NasKdError(f"{STORAGE}: {error}") from None


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The arguments of processes that do a study's work."""
    add = parser.add_argument_group("workers (docs/workers.md)").add_argument
    add(
        "--jobs",
        type=number(1),
        metavar="N",
        help="processes that train trials, spread over the GPUs (%(default)s)",
    )
    add(
        "--artifacts",
        type=path,
        metavar="STORE",
        help="where workers on other machines fetch the teacher, views and library: FOLDER, s3://… or gs://…",
    )
    add(
        "--grace-period",
        type=number(4),
        metavar="S",
        help="seconds of silence after which a worker is dead and its trial goes to another (%(default)s)",
    )
