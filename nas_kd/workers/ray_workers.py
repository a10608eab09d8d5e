"""`--ray`: workers as tasks of a Ray cluster, which gives each a place and its GPUs and starts those anew that die.

All that a task does is to run the worker's command and to wait for its end.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nas_kd.arguments.sharing import STORAGE
from nas_kd.arguments.worker import WorkerSettings
from nas_kd.errors import StudyError
from nas_kd.workers.pool import LocalWorker, file_arguments, stop_all, worker_arguments

_POLL = 0.2  # seconds between two looks at a worker's process
_RETRIES = 5  # of a task whose worker died
_LOCAL = "local"  # the address of a cluster that is started on this machine
_TOKENS = "ray._private.authentication.authentication_token_setup"  # Ray's logger
_logger = logging.getLogger(__name__)


class WorkerDied(RuntimeError):
    """A worker ended as it should not; Ray runs its task again, on this machine or another one."""


def run_worker_process(arguments: Sequence[str], storage: str) -> tuple[int, str]:
    """A Ray task: runs a worker to its end, and returns its exit code and last words.

    Raises WorkerDied when it was killed. When the task is cancelled the worker puts its trial back.
    """
    worker = LocalWorker(arguments, {**os.environ, STORAGE: storage})  # Ray has set its threads and GPUs
    worker.start()
    try:
        while (code := worker.code()) is None:
            time.sleep(_POLL)
        words = worker.words()
    finally:
        stop_all([worker])
    if code not in (0, 2):
        raise WorkerDied(words)
    return code, words


class RayWorker:
    """A worker of a pool that runs as a Ray task."""

    def __init__(self, ray: Any, gpus: float, arguments: Sequence[str], storage: str) -> None:
        options = {"num_gpus": gpus, "max_retries": _RETRIES, "retry_exceptions": [WorkerDied]}
        self.ray, self.call = ray, (arguments, storage)
        self.remote = ray.remote(**options)(run_worker_process)
        self.task: Any = None
        self.end: tuple[int, str] = (0, "")

    def start(self) -> None:
        """Submits the task."""
        self.task = self.remote.remote(*self.call)

    def code(self) -> int | None:
        """The worker's exit code; 1 when it died more often than Ray restarts it, None until then."""
        if self.task is not None and self.ray.wait([self.task], timeout=0)[0]:
            self.end, self.task = self._collect(), None
        return self.end[0] if self.task is None else None

    def _collect(self) -> tuple[int, str]:
        errors = self.ray.exceptions
        try:
            end: tuple[int, str] = self.ray.get(self.task)
            return end
        except errors.TaskCancelledError:
            return 0, "cancelled"
        except (WorkerDied, errors.WorkerCrashedError, errors.NodeDiedError) as error:
            return 1, _last_line(error)
        except errors.RayError as error:  # as where nas_kd is not installed
            return 2, f"a Ray task cannot run a worker: {_last_line(error)}"

    def words(self) -> str:
        """What it said last."""
        return self.end[1]

    def ask_to_stop(self) -> None:
        """Interrupts the task, which lets the worker put its trial back."""
        if self.code() is None:
            self.ray.cancel(self.task, force=False)

    def wait(self, seconds: float) -> None:
        """Waits so long for its end; what is left ends with the cluster's connection."""
        if self.task is not None:
            self.ray.wait([self.task], timeout=seconds)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:200]


@contextmanager
def ray_workers(settings: WorkerSettings, name: str, part: str) -> Iterator[list[RayWorker]]:
    """A worker's `--jobs` for a part of the study of this name, as tasks of the Ray cluster that `--ray` names.

    Raises StudyError when there is none, or Ray is not installed.
    """
    ray = _connect(settings.ray or "auto")
    try:
        gpus = _gpus(settings.num_gpus, ray.cluster_resources())
        arguments = [*worker_arguments(name, settings.grace_period, part), *file_arguments(settings)]
        arguments += ["--device", settings.device] if settings.device else []
        yield [RayWorker(ray, gpus, arguments, settings.storage) for _ in range(settings.jobs)]
    finally:
        ray.shutdown()


def _connect(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unless a user wants it
    try:
        import ray
    except ImportError as error:
        raise StudyError("--ray needs Ray: pip install 'nas-kd[ray]'") from error
    options: dict[str, Any] = {"include_dashboard": False} if address == _LOCAL else {"address": address}
    # it tells at every start that its ports now ask for a token, which its own tasks have: no line of ours
    logging.getLogger(_TOKENS).setLevel(logging.ERROR)
    try:
        ray.init(**options, log_to_driver=False, configure_logging=False)
    except Exception as error:  # Ray raises a plain one where a node starts too slowly
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise StudyError(
            f"cannot reach the Ray cluster {address!r}: {first}; start one with 'ray start --head', or give --ray local"
        ) from error
    return ray


def _gpus(wanted: float | None, resources: dict[str, float]) -> float:
    """The GPUs of each task. Those of a cluster that grows may still come: a warning, no mistake."""
    available = resources.get("GPU", 0.0)
    if wanted is None:
        return min(1.0, available)
    if wanted > available:
        _logger.warning("the Ray cluster has %g GPUs: workers that want %g wait until it has more", available, wanted)
    return wanted
