"""`--jobs N`: worker processes on this machine, each the same as one that joins from another, and what they are at."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import optuna
import torch
from optuna.trial import FrozenTrial

from nas_kd.arguments.sharing import STORAGE
from nas_kd.arguments.study import Settings
from nas_kd.arguments.worker import TRIALS, WorkerSettings
from nas_kd.budget import short
from nas_kd.errors import NasKdError, OutputError, StudyError
from nas_kd.preparation.job import storage_url
from nas_kd.progress import Board, WorkerLine
from nas_kd.search.budgets import count_trained, noted_cost
from nas_kd.search.claims import is_trained
from nas_kd.search.rungs import rung_scores
from nas_kd.search.storage import storage_errors
from nas_kd.search.trials import best_score
from nas_kd.search.work import retry_abandoned
from nas_kd.search.workers import WORKER, Watch, retry_dead_trials, retry_lost_trials, running

WORKERS = "nas_kd.worker"  # the module that a worker runs
_POLL = 0.5  # seconds between two looks
_STOP_SECONDS = 30.0  # for a worker to put its trial back, before it is killed
_RESTARTS = 5  # of workers in a row without a finished trial
_logger = logging.getLogger(__name__)


class Worker(Protocol):
    """A worker that a pool starts, wherever it runs."""

    def start(self) -> None:
        """Starts it, again if it has ended."""

    def code(self) -> int | None:
        """Its exit code, 2 for a mistake of the user's; None while it runs."""

    def words(self) -> str:
        """What it said last, else how it ended."""

    def ask_to_stop(self) -> None:
        """Lets it put its trial back and end."""

    def wait(self, seconds: float) -> None:
        """Waits so long for its end, then ends it by force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPool:
    """Workers to start, for a study that wants `trials` of `epochs`."""

    workers: tuple[Worker, ...]
    trials: int
    epochs: int
    grace: int


def pool_of(settings: Settings, out: Path) -> WorkerPool:
    """The workers that a study's settings ask for."""
    command = [*worker_arguments(settings.name, settings.sharing.grace_period, TRIALS), "--out", str(out)]
    return WorkerPool(
        workers=tuple(
            local_workers(command, storage_url(settings.sharing, out), settings.training.device, settings.sharing.jobs)
        ),
        trials=settings.search.trials,
        epochs=settings.proxy.epochs,
        grace=settings.sharing.grace_period,
    )


def worker_arguments(name: str, grace: int, part: str) -> list[str]:
    """The arguments of a worker for one part of a study's work, which ends when the process that started it does."""
    return ["--leash", "--quiet", "--study-name", name, "--grace-period", str(grace), "--part", part]


def file_arguments(settings: WorkerSettings) -> list[str]:
    """Where a worker's own workers find the study's files."""
    given = (("--out", settings.out), ("--artifacts", settings.artifacts))
    return [word for option, value in given if value for word in (option, value)]


def local_workers(
    command: Sequence[str], url: str, device: str | None, count: int, *, first: int = 0, module: str = WORKERS
) -> list[LocalWorker]:
    """`count` processes that run a module's command on this machine, without those before the `first`: spread over the
    GPUs, or each with its share of the threads. The storage is at `url`."""
    shared = {**os.environ, STORAGE: url, "OMP_NUM_THREADS": str(share_of_threads(count))}  # for no command line
    devices = devices_for(device, count)[first:]
    return [LocalWorker([*command, "--device", each], shared, module) for each in devices]


def devices_for(device: str | None, jobs: int, gpus: int | None = None) -> list[str]:
    """The device of each worker: the one that is asked for, else the GPUs in turn, or the CPU where there is none."""
    gpus = torch.cuda.device_count() if gpus is None else gpus
    if device in (None, "cuda") and gpus:
        return [f"cuda:{index % gpus}" for index in range(jobs)]
    return [device or "cpu"] * jobs


def share_of_threads(count: int) -> int:
    """The threads of each of so many processes, at least one."""
    return max(1, torch.get_num_threads() // count)


def run_pool(pool: WorkerPool, study: optuna.Study, board: Board, sleep: Callable[[float], None] = time.sleep) -> None:
    """Runs workers until the study has what it wants; a worker that dies is replaced and its trial retried.

    Raises what a worker ended with when that is a mistake of the user's, StudyError when workers die again and again.
    Ctrl-C lets each put its trial back.
    """
    workers = pool.workers
    watch = Watch(grace=pool.grace)
    seen = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    deaths = 0
    retry_lost_trials(study)
    try:
        for worker in workers:
            worker.start()
        while any(worker.code() is None for worker in workers):
            sleep(_POLL)
            retry_abandoned(study, watch)
            if count_trained(study) < pool.trials:
                deaths += _replace_dead(workers)
            elif not running(study):  # what has not begun, as a task that waits for a GPU, need not
                break
            if _show_progress(study, seen, pool, board):
                deaths = 0
            if deaths > _RESTARTS:
                raise StudyError(f"{deaths} workers died in a row: the last warning says how")
        _show_progress(study, seen, pool, board)
    finally:
        stop_all(workers)
        with suppress(OutputError), storage_errors("put back the trials of workers that were stopped"):
            retry_dead_trials(study, died=False)  # of those that were too slow to do so themselves
    if (done := count_trained(study)) < pool.trials:
        _logger.warning("only %d of %d trials trained: the sampler found too few students", done, pool.trials)


def run_to_end(workers: Sequence[Worker], sleep: Callable[[float], None] = time.sleep) -> int:
    """Runs workers until each has ended by itself, starts those anew that die, and returns 0.

    Raises what a worker ended with when that is a mistake of the user's, StudyError when workers die again and again.
    """
    deaths = 0
    try:
        for worker in workers:
            worker.start()
        while any(worker.code() is None for worker in workers):
            sleep(_POLL)
            deaths += _replace_dead(workers)
            if deaths > _RESTARTS:
                raise StudyError(f"{deaths} workers died in a row: the last warning says how")
    finally:
        stop_all(workers)
    return 0


def _replace_dead(workers: Sequence[Worker]) -> int:
    """Starts those workers anew that were killed, and returns how many. Raises NasKdError when one met a mistake."""
    dead = 0
    for worker in workers:
        code = worker.code()
        if code == 2:
            raise NasKdError(worker.words())
        if code not in (None, 0):
            _logger.warning("a worker died (%s): its trial goes to another one", worker.words())
            worker.start()
            dead += 1
    return dead


def stop_all(workers: Sequence[Worker], seconds: float = _STOP_SECONDS) -> None:
    """Asks every worker to put its trial back and waits so long; kills those that do not end."""
    for worker in workers:
        worker.ask_to_stop()
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.wait(max(0.0, deadline - time.monotonic()))


def _show_progress(study: optuna.Study, seen: set[int], pool: WorkerPool, board: Board) -> int:
    """Shows trials that finished since the last look, and what each worker is at; returns how many finished."""
    finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and t.number not in seen]
    for trial in finished:
        seen.add(trial.number)
        advance_by(board, trial)
    board.show({str(trial.user_attrs.get(WORKER, "?")): line_of(trial, pool.epochs) for trial in running(study)})
    return sum(map(is_trained, finished))


def line_of(trial: FrozenTrial, epochs: int) -> WorkerLine:
    """What is known of a running trial."""
    rungs = [epoch for epoch, _ in rung_scores(trial.user_attrs)]
    score = best_score(trial)
    cost = noted_cost(trial)
    size = f", {short(cost.params)}" if cost else ""
    words = "" if math.isnan(score) else f": {100 * score:.1f} %"
    return WorkerLine(done=max(rungs, default=0), total=epochs, words=f"trial {trial.number}{size}{words}")


def advance_by(board: Board, trial: FrozenTrial) -> None:
    """Tells of a finished trial, if it trained."""
    if is_trained(trial):
        score, cost = best_score(trial), noted_cost(trial)
        words = "stopped, its loss is not finite" if math.isnan(score) else f"{100 * score:.1f} %"
        size = f" at {short(cost.params)}" if cost else ""
        board.advance(f"trial {trial.number}: {words}{size}")


class LocalWorker:
    """A worker process. It ends by itself when this one does: its standard input is a pipe that then closes."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], module: str = WORKERS) -> None:
        self.command, self.environment = [sys.executable, "-m", module, *arguments], environment
        self.process: subprocess.Popen[bytes] | None = None
        self.errors: IO[Any] = tempfile.TemporaryFile()

    def start(self) -> None:
        """Starts it, again if it has ended."""
        self.wait(0)  # closes what the one before it had
        self.errors.close()
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C in the terminal reaches this process alone, which passes it on
        )

    @property
    def pid(self) -> int:
        """The number of its process; 0 before it was started."""
        return 0 if self.process is None else self.process.pid

    def tell(self, line: str) -> None:
        """Writes a line to its standard input; one that has ended hears nothing."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.write(f"{line}\n".encode())
                self.process.stdin.flush()

    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return None if self.process is None else self.process.poll()

    def words(self) -> str:
        """What it said last, else how it ended."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        code = self.code()
        if lines and code is not None and code > 0:
            return str(lines[-1].removeprefix("nas_kd: "))
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def ask_to_stop(self) -> None:
        """Sends what a cluster would: Ctrl-C is ignored by processes that a shell runs in the background."""
        if self.process is not None and self.code() is None:
            with suppress(ProcessLookupError):
                self.process.terminate()

    def wait(self, seconds: float) -> None:
        """Waits so long for its end, then kills it."""
        if self.process is None:
            self.errors.close()
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.errors.close()
