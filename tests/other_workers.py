"""Tests of work that other processes and machines share: storages that these reach, and what they are at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import servers
from optuna.trial import TrialState

from nas_kd.search.jobs import do_jobs
from nas_kd.search.workers import WORKER, worker_name


@contextmanager
def shared_storage(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a storage, `sqlite` in a folder or a `postgresql` of our own; skips the test where that is missing."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'shared.db'}"
        return
    if servers.postgres_folder() is None:
        pytest.skip("PostgreSQL is not installed")
    with servers.postgres() as server:
        yield server.url


def only_after(event: Callable[[optuna.Study], object]) -> Callable[..., int]:
    """Doing jobs here, once something has happened to another process, which has the others until then."""

    def do(jobs: Any, *arguments: Any, **more: Any) -> int:
        while not event(jobs):
            time.sleep(0.05)
        return do_jobs(jobs, *arguments, **more)

    return do


def others_at_work(jobs: optuna.Study) -> list[int]:
    """The numbers of the other processes that are at a job."""
    own = worker_name()
    found = jobs.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [int(name.rpartition(":")[2]) for name in {str(job.user_attrs.get(WORKER, own)) for job in found} - {own}]
