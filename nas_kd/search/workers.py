"""Who runs the trials of a study: which workers live, and what becomes of the trials of those that do not."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas_kd.files.digests import digest_of

WORKER = "worker"  # the user attribute of a trial that names the process which runs it
BEAT = "beat"  # the user attribute that a living worker counts up
RETRY = "retry of"  # the user attribute of a trial that does again what another was killed in
RETRIES = "retries"  # how many trials of this genotype have died before
GENOTYPE = "genotype"  # the user attribute of a trial that has all its parameters
ERROR = "error"  # the user attribute of a trial that failed by itself
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
    return f"{socket.gethostname()}-{digest_of(facts, 4)}"


def requeue(study: optuna.Study, trial: FrozenTrial, *, died: bool = True) -> None:
    """Queues what a trial was to do once more, with what it had at its rungs; unless it `died` too often, or had yet to
    be told what to do.

    A fresh trial and no copy: constraints that it inherited could not be set again.
    """
    if not may_be_retried(trial, died=died) or trial.number in _retried(study.get_trials(deepcopy=False)):
        return
    kept = {key: value for key, value in trial.user_attrs.items() if key == "source" or key.startswith("rung/")}
    noted = {"source": "sampler", **kept, RETRY: trial.number, RETRIES: _retries(trial, died)}
    study.enqueue_trial(_point(trial), user_attrs=noted)


def may_be_retried(trial: FrozenTrial, *, died: bool = True) -> bool:
    """Whether there is something to do once more, and it has not killed too many workers."""
    return bool(_point(trial)) and _retries(trial, died) <= MAX_RETRIES


def queued_point(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters that a trial was queued with; empty for one that was proposed."""
    return dict(trial.system_attrs.get("fixed_params", {}))


def _point(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial was to do: as queued, or as proposed once all of it is noted; half of a proposal is none."""
    return queued_point(trial) or (trial.params if GENOTYPE in trial.user_attrs else {})


def _retries(trial: FrozenTrial, died: bool) -> int:
    return int(trial.user_attrs.get(RETRIES, 0)) + died


def _retried(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of the trials that were queued again."""
    return {trial.user_attrs[RETRY] for trial in trials if RETRY in trial.user_attrs}


def undisturbed(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """A study's trials, each in the place of the one that it does again."""
    places: dict[int, int] = {}
    for trial in trials:
        places[trial.number] = places.get(trial.user_attrs.get(RETRY, -1), trial.number)
    return sorted(trials, key=lambda trial: (places[trial.number], trial.number))


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
    end than one that has not. No trial runs without the name of its worker, so that it is found however that ends."""

    def ask(self, fixed_distributions: dict[str, BaseDistribution] | None = None) -> optuna.Trial:
        """The next trial, as every `study.optimize` asks for it."""
        if fixed_distributions:
            return super().ask(fixed_distributions)
        self._thread_local.cached_all_trials = None  # as Optuna does: a sampler shall see what others have done
        taken = self.take()
        return optuna.Trial(self, self._begin() if taken is None else taken)

    def take(self) -> int | None:
        """The storage's number of a trial that waited, None where none does. It is signed before it is taken; of two
        who sign the same one the later takes it, and the other one leaves it."""
        waiting = self.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        for trial in sorted(waiting, key=_turn):
            identity = trial._trial_id
            with suppress(UpdateFinishedTrialError):  # another worker was faster, and so it says False below
                sign(self._storage, identity, TrialState.WAITING)
                if self._is_own(identity) and self._storage.set_trial_state_values(identity, state=TrialState.RUNNING):
                    # the rest of the race: it was signed once more as it was taken
                    sign(self._storage, identity, TrialState.RUNNING)
                    return identity
        return None

    def _is_own(self, trial_id: int) -> bool:
        return _worker(self._storage.get_trial(trial_id)) == worker_name()

    def _begin(self) -> int:
        """A new trial, its worker noted in the same step."""
        signed = create_trial(state=TrialState.RUNNING, user_attrs={WORKER: worker_name()})
        return self._storage.create_new_trial(self._study_id, template_trial=signed)


def sign(storage: BaseStorage, trial_id: int, state: TrialState) -> None:
    """Notes this process as a trial's worker, while the trial is in that state: what another one runs stays its own."""
    found = storage.get_trial(trial_id)
    if found.state == state and _worker(found) != worker_name():
        storage.set_trial_user_attr(trial_id, WORKER, worker_name())


def _turn(trial: FrozenTrial) -> tuple[bool, bool, int]:
    """In which order trials that wait are taken: those last that another living worker is about to take."""
    is_wanted = _worker(trial) not in ("", worker_name()) and not _is_dead(trial)
    return is_wanted, RETRY not in trial.user_attrs, trial.number


def running(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that somebody runs, or did when they were killed."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def retry_dead_trials(study: optuna.Study, *, died: bool = True) -> int:
    """Queues the trials again that killed processes of this machine left behind, and returns how many; they did not
    `die` of their trials where they were killed because they took too long to stop.

    Those of other machines are found by their silence, after minutes.
    """
    return sum(give_up(study, trial, died=died) for trial in running(study) if _is_dead(trial))


def lost(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those of a study's trials that failed by no fault of their own and were not queued again: who ended them was
    killed before it could."""
    failed = [trial for trial in trials if trial.state == TrialState.FAIL and ERROR not in trial.user_attrs]
    retried = _retried(trials) if failed else ()
    return [trial for trial in failed if trial.number not in retried and may_be_retried(trial)]


def retry_lost_trials(study: optuna.Study) -> None:
    """Queues the lost trials again."""
    for trial in lost(study.get_trials(deepcopy=False)):
        requeue(study, trial)


def release_own_trials(study: optuna.Study) -> int:
    """Queues again what this process was doing when it was asked to stop, and returns how many trials that were."""
    return sum(give_up(study, trial, died=False) for trial in running(study) if _worker(trial) == worker_name())


def _worker(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get(WORKER, ""))


def _is_dead(trial: FrozenTrial) -> bool:
    return is_gone(_worker(trial))


def is_gone(worker: str) -> bool:
    """Whether a process of this name was one of this machine, and is no more."""
    machine, _, process = worker.rpartition(":")
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
    """Finds trials whose worker fell silent, by this process's own clock: clocks of workers are never compared; and
    those that were lost for as long.

    Each worker counts a `beat` up, and a trial whose count stands still for `grace` seconds is given up. Databases have
    heartbeats of their own, which `study.optimize` uses, but not Optuna's proxy, nor for a worker that died before its
    first.
    """

    def __init__(self, *, grace: float = GRACE, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace, self.clock = grace, clock
        self._seen: dict[int, tuple[Any, float]] = {}

    def retry_silent_trials(self, study: optuna.Study) -> int:
        """Queues the trials again that were silent for too long, and returns how many."""
        found = study.get_trials(deepcopy=False)
        trials = [*(trial for trial in found if trial.state == TrialState.RUNNING), *lost(found)]
        numbers = {trial.number for trial in trials}
        self._seen = {number: seen for number, seen in self._seen.items() if number in numbers}
        return sum(_give_up_or_retry(study, trial) for trial in trials if self._is_silent(trial))

    def _is_silent(self, trial: FrozenTrial) -> bool:
        sign, now = _sign_of_life(trial.user_attrs), self.clock()
        before, since = self._seen.get(trial.number, (None, now))
        if sign != before:
            self._seen[trial.number] = (sign, now)
            return False
        return now - since > self.grace


def _give_up_or_retry(study: optuna.Study, trial: FrozenTrial) -> bool:
    if trial.state == TrialState.RUNNING:
        return give_up(study, trial)
    requeue(study, trial)
    return True


def _sign_of_life(attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    return attributes.get(WORKER), attributes.get(BEAT), len(attributes)


@contextmanager
def beating(trial: optuna.Trial, interval: float) -> Iterator[None]:
    """Counts the trial's beat up every so many seconds while the block runs, and signs it again where another worker,
    which thought that it waited, has signed it too."""
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(interval):
            count += 1
            with suppress(Exception):  # a beat that is lost is no reason to stop: the trial itself will notice
                trial.storage.set_trial_user_attr(trial._trial_id, BEAT, count)
                sign(trial.storage, trial._trial_id, TrialState.RUNNING)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
