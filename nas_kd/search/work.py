"""What a worker does: one trial after the other, beside others, until the study has what it wants."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from nas_kd.errors import OutputError
from nas_kd.search import signals
from nas_kd.search.storage import is_storage_error
from nas_kd.search.trials import Objective, count_trained
from nas_kd.search.workers import (
    ERROR,
    GRACE,
    WORKER,
    Watch,
    beating,
    release_own_trials,
    requeue,
    retry_dead_trials,
    retry_lost_trials,
    running,
    worker_name,
)

_POLL = 0.5  # seconds between two looks at what others do
_logger = logging.getLogger(__name__)


def ignore(trial: FrozenTrial) -> None:
    """The tick that tells nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a worker's trials end: when the study has trained `target()` students, or after `cap` times as many asks as
    were missing. `grace` is the silence, in seconds, after which another worker is taken for dead; `sleep` waits."""

    target: Callable[[], int]
    cap: int = 50
    grace: float = GRACE
    sleep: Callable[[float], None] = time.sleep


def run_trials(
    study: optuna.Study,
    objective: Objective,
    *,
    trained: int,
    tick: Callable[[FrozenTrial], None] = ignore,
    cap: int = 50,
) -> None:
    """Runs trials until `trained` of the study have trained a student, or `cap` times as many were asked for now."""
    work(study, objective, Limits(target=lambda: trained, cap=cap), tick)


def work(
    study: optuna.Study, objective: Objective, limits: Limits, tick: Callable[[FrozenTrial], None] = ignore
) -> None:
    """Runs trials of a study, beside other workers, as many as are still missing.

    While others run the last missing ones it waits, to take over what they leave. Ctrl-C and SIGTERM end it with
    KeyboardInterrupt; the trial that it was at is queued again and goes on from its last rung, also when a disk is full
    or a database gone.
    """
    worker = _Worker(study, objective, limits, tick)
    asks = max(0, limits.target() - count_trained(study)) * limits.cap
    with signals.handled():
        try:
            retry_lost_trials(study)
            while worker.asked < asks and worker.may_start():
                worker.optimize(asks - worker.asked)
            stop_if_asked()
        except BaseException as error:
            if is_from_outside(error):
                worker.release()
            raise
    if (done := count_trained(study)) < (wanted := limits.target()):
        _logger.warning("only %d of %d trials trained: the sampler found too few students within budget", done, wanted)


def settle(study: optuna.Study, grace: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Waits until no trial is running: others bring theirs to an end, those of the dead are given up."""
    watch = Watch(grace=grace)
    while running(study):
        retry_abandoned(study, watch)
        if running(study):
            sleep(_POLL)


def retry_abandoned(study: optuna.Study, watch: Watch) -> None:
    """Queues the trials again whose workers died: on this machine, or silent for too long."""
    retry_dead_trials(study)
    watch.retry_silent_trials(study)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def is_from_outside(error: BaseException) -> bool:
    """Whether a trial ended by nothing of its own: it was interrupted, or nothing could be written."""
    return isinstance(error, KeyboardInterrupt | OutputError) or is_storage_error(error)


def _note_bug(trial: optuna.Trial, error: BaseException) -> None:
    """Marks a trial that fails by itself: it is not done again."""
    if isinstance(error, Exception) and not (isinstance(error, optuna.TrialPruned) or is_from_outside(error)):
        with suppress(Exception):  # the error itself is the one to tell
            trial.set_user_attr(ERROR, f"{type(error).__name__}: {error}"[:200])


def stop_if_asked() -> None:
    if signals.is_asked():
        raise KeyboardInterrupt


class _Worker:
    """The state of a worker: how many trials it `asked` for, the one that it is `at`, and how that ended."""

    def __init__(
        self, study: optuna.Study, objective: Objective, limits: Limits, tick: Callable[[FrozenTrial], None]
    ) -> None:
        self.study, self.objective, self.limits, self.tick = study, objective, limits, tick
        self.watch = Watch(grace=limits.grace)
        self.asked, self.at = 0, -1
        self.error: BaseException | None = None

    def optimize(self, asks: int) -> None:
        """Runs up to `asks` trials; ends early when nothing is missing, or when a trial was taken away."""
        try:
            self.study.optimize(self._run, n_trials=asks, callbacks=[self._after], gc_after_trial=False)
        except Exception as error:
            cause = error.__context__
            if isinstance(error, AssertionError) and cause is not None and is_storage_error(cause):
                raise cause from cause.__cause__  # Optuna does not think of trials that cannot be ended
            if not self._was_taken(error):
                raise
            _logger.warning("trial %d was given to another worker: this one was silent for too long", self._number())

    def _run(self, trial: optuna.Trial) -> tuple[float, ...]:
        self.asked, self.at, self.error = self.asked + 1, trial._trial_id, None
        try:
            with beating(trial, self.limits.grace / 4), signals.at_once():
                return self.objective(trial)
        except BaseException as error:
            self.error = error
            _note_bug(trial, error)
            raise

    def _after(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.tick(trial)
        stop_if_asked()
        if not self.may_start():
            study.stop()

    def may_start(self) -> bool:
        """Whether another trial is wanted; waits while those that others run may be enough."""
        while True:
            trained, target = count_trained(self.study), self.limits.target()
            if trained >= target:
                return False
            retry_abandoned(self.study, self.watch)
            others = [trial for trial in running(self.study) if self._is_anothers(trial)]
            if trained + len(others) < target:
                return True
            self.limits.sleep(_POLL)
            stop_if_asked()

    def _is_anothers(self, trial: FrozenTrial) -> bool:
        return str(trial.user_attrs.get(WORKER, worker_name())) != worker_name()

    def _was_taken(self, error: Exception) -> bool:
        """Whether an error means that another worker has ended this one's trial, taking it for dead."""
        if isinstance(self.error, UpdateFinishedTrialError):
            return True
        if error is self.error or is_storage_error(error):
            return False
        state: TrialState = self._trial().state
        return state == TrialState.FAIL

    def _trial(self) -> FrozenTrial:
        return self.study._storage.get_trial(self.at)

    def _number(self) -> int:
        return self._trial().number

    def release(self) -> None:
        """Queues the interrupted trial again. What cannot be written now is found by the next worker: a trial whose
        process is gone."""
        try:
            release_own_trials(self.study)
            if self.error and is_from_outside(self.error) and self._trial().state == TrialState.FAIL:
                requeue(self.study, self._trial(), died=False)
        except Exception as error:
            if not is_storage_error(error):
                raise
