"""Who runs the trials of a study: which workers live, and what becomes of the trials of those that do not."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

WORKER = "worker"  # the user attribute of a trial that names the process which runs it
BEAT = "beat"  # the user attribute that a living worker counts up
RETRY = "retry of"  # the user attribute of a trial that does again what another was killed in
RETRIES = "retries"  # how many trials of this genotype have died before
GRACE = 120  # seconds; a worker that was silent for so long is dead
MAX_RETRIES = 2  # what killed three workers would kill a fourth


def worker_name() -> str:
    """Names this process among all that run trials of a study."""
    return f"{_machine()}:{os.getpid()}"


@cache
def _machine() -> str:
    """The host's name and four digits of its boot and of its process numbers: containers often share a name."""
    facts = socket.gethostname()
    with suppress(OSError):
        facts += Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        facts += os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()}-{hashlib.sha256(facts.encode()).hexdigest()[:4]}"


def requeue(study: optuna.Study, trial: FrozenTrial, *, died: bool = True) -> None:
    """Queues what a trial was to do once more, with what it had at its rungs; unless it `died` too often.

    A fresh trial and no copy: constraints that it inherited could not be set again.
    """
    retries = trial.user_attrs.get(RETRIES, 0) + died
    point = trial.system_attrs.get("fixed_params") or trial.params
    if not point or retries > MAX_RETRIES:
        return
    kept = {key: value for key, value in trial.user_attrs.items() if key == "source" or key.startswith("rung/")}
    study.enqueue_trial(point, user_attrs={"source": "sampler", **kept, RETRY: trial.number, RETRIES: retries})


def give_up(study: optuna.Study, trial: FrozenTrial, *, died: bool = True) -> bool:
    """Ends a trial that nobody runs any more and queues it again; False when another worker did so first."""
    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):  # both mean: it is finished
        return False
    requeue(study, trial, died=died)
    return True


class RetryingStudy(optuna.Study):
    """A study that gives what is to be retried before anything else that waits: a trial that has begun is nearer to its
    end than one that has not."""

    def ask(self, fixed_distributions: dict[str, BaseDistribution] | None = None) -> optuna.Trial:
        """The next trial, as every `study.optimize` asks for it."""
        retried = None if fixed_distributions else self._take_retried()
        return super().ask(fixed_distributions) if retried is None else retried

    def _take_retried(self) -> optuna.Trial | None:
        for trial in self.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            with suppress(UpdateFinishedTrialError):  # another worker was faster, and so it says False below
                if RETRY in trial.user_attrs and self._storage.set_trial_state_values(
                    trial._trial_id, state=TrialState.RUNNING
                ):
                    return optuna.Trial(self, trial._trial_id)
        return None


def running(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that somebody runs, or did when they were killed."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def retry_dead_trials(study: optuna.Study) -> int:
    """Queues the trials again that killed processes of this machine left behind, and returns how many.

    Those of other machines are found by their silence, after minutes.
    """
    return sum(give_up(study, trial) for trial in running(study) if _is_dead(trial))


def release_own_trials(study: optuna.Study) -> int:
    """Queues again what this process was doing when it was asked to stop, and returns how many trials that were."""
    return sum(
        give_up(study, trial, died=False) for trial in running(study) if trial.user_attrs.get(WORKER) == worker_name()
    )


def _is_dead(trial: FrozenTrial) -> bool:
    machine, _, process = trial.user_attrs.get(WORKER, "").rpartition(":")
    if os.name != "posix" or machine != _machine():
        return False
    try:
        os.kill(int(process), 0)  # sends nothing: asks whether the process is there
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class Watch:
    """Finds trials whose worker fell silent, by this process's own clock: clocks of workers are never compared.

    Each worker counts a `beat` up, and a trial whose count stands still for `grace` seconds is given up. Databases have
    heartbeats of their own, which `study.optimize` uses, but not Optuna's proxy, nor for a worker that died before its
    first.
    """

    def __init__(self, *, grace: float = GRACE, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace, self.clock = grace, clock
        self._seen: dict[int, tuple[Any, float]] = {}

    def retry_silent_trials(self, study: optuna.Study) -> int:
        """Queues the trials again that were silent for too long, and returns how many."""
        trials = {trial.number: trial for trial in running(study)}
        self._seen = {number: seen for number, seen in self._seen.items() if number in trials}
        return sum(give_up(study, trial) for trial in trials.values() if self._is_silent(trial))

    def _is_silent(self, trial: FrozenTrial) -> bool:
        sign, now = _sign_of_life(trial.user_attrs), self.clock()
        before, since = self._seen.get(trial.number, (None, now))
        if sign != before:
            self._seen[trial.number] = (sign, now)
            return False
        return now - since > self.grace


def _sign_of_life(attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    return attributes.get(WORKER), attributes.get(BEAT), len(attributes)


@contextmanager
def beating(trial: optuna.Trial, interval: float) -> Iterator[None]:
    """Counts the trial's beat up every so many seconds while the block runs."""
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(interval):
            count += 1
            with suppress(Exception):  # a beat that is lost is no reason to stop: the trial itself will notice
                trial.storage.set_trial_user_attr(trial._trial_id, BEAT, count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
