"""Work that is shared out beside trials: a study of its own in the same storage, in which each trial is one job.

So a job is taken, signed, and taken over from the dead exactly as a trial is. Its key names what is to be done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from nas_kd.errors import NasKdError
from nas_kd.search import signals
from nas_kd.search.storage import storage_errors
from nas_kd.search.work import is_from_outside, retry_abandoned, stop_if_asked
from nas_kd.search.workers import (
    ERROR,
    RetryingStudy,
    Watch,
    beating,
    release_own_trials,
    retry_lost_trials,
    running,
)

# kinds of jobs: each has a study of its own, of the study's name and this word
MODELS, LIBRARY, GENOTYPES = KINDS = "models", "library", "genotypes"
_KEY = "job"
_POLL = 0.5  # seconds between two looks at what others do
_logger = logging.getLogger(__name__)
Notes = Mapping[str, Any]


def post_jobs(storage: BaseStorage, name: str, keys: Sequence[str], kind: str = MODELS) -> RetryingStudy:
    """The jobs of a kind of the study `name`, these and no others; what was done or begun of them before stays so."""
    with storage_errors(f"share out the {kind} of {name!r}"):
        own = _name(name, kind)
        optuna.create_study(storage=storage, study_name=own, direction="maximize", load_if_exists=True)
        jobs = RetryingStudy(own, storage)
        there = set()
        for trial in jobs.get_trials(deepcopy=False):
            if trial.state == TrialState.WAITING and key_of(trial) not in keys:  # of another plan
                with suppress(UpdateFinishedTrialError):  # a worker that was quick
                    storage.set_trial_user_attr(trial._trial_id, ERROR, "not wanted any more")
                    storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
            elif trial.state != TrialState.FAIL:
                there.add(key_of(trial))
        for key in keys:
            if key not in there:
                jobs.enqueue_trial({_KEY: key})
    return jobs


def open_jobs(storage: BaseStorage, name: str, kind: str = MODELS) -> RetryingStudy | None:
    """The jobs of a study while there are any."""
    with suppress(KeyError):  # there are none, or they were put away at this moment
        return RetryingStudy(_name(name, kind), storage)
    return None


def remove_jobs(storage: BaseStorage, name: str, kind: str = MODELS) -> None:
    """Forgets the jobs of a study, if there are any: all are done."""
    with storage_errors(f"put away the {kind} of {name!r}"), suppress(KeyError):
        optuna.delete_study(study_name=_name(name, kind), storage=storage)


def _name(name: str, kind: str) -> str:
    return f"{name} {kind}"


def study_of(name: str) -> tuple[str, str | None]:
    """The study that one in the storage belongs to, and what kind of jobs it is: None where it is a study itself."""
    own, _, kind = name.rpartition(" ")
    return (own, kind) if own and kind in KINDS else (name, None)


def key_of(job: FrozenTrial) -> str:
    """What a job is to do."""
    return str(job.system_attrs.get("fixed_params", {}).get(_KEY))


def done_jobs(jobs: optuna.Study) -> dict[str, Notes]:
    """What was noted of each job that is done, by its key."""
    return {key_of(job): job.user_attrs for job in jobs.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}


@dataclass(slots=True)
class Told:
    """Tells of the jobs with these `keys` that others have done, not those in `own`: of each once, by its key."""

    jobs: RetryingStudy
    keys: Collection[str]
    own: Collection[str]
    each: Callable[[str, Notes], None]
    done: set[str] = field(default_factory=set)

    def tell(self) -> None:
        """Tells of what was done since the last time."""
        found = done_jobs(self.jobs)
        for key in sorted(found.keys() & set(self.keys) - self.done - set(self.own)):
            self.done.add(key)
            self.each(key, found[key])

    def beside(self, sleep: Callable[[float], None]) -> Callable[[float], None]:
        """What sleeps so, and tells."""

        def sleep_and_tell(seconds: float) -> None:
            sleep(seconds)
            self.tell()

        return sleep_and_tell


def do_jobs(
    jobs: RetryingStudy,
    run: Callable[[str], tuple[float, Notes]],
    *,
    grace: float,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Does jobs until none is left that waits or that others are at, and returns how many: `run` does that of a key and
    gives a score and what is to be noted of it. One that fails by itself is left to the study's command.

    Ctrl-C, SIGTERM, a full disk or a lost database put the job back.
    """
    watch, done = Watch(grace=grace), 0
    with signals.handled():
        try:
            retry_lost_trials(jobs)
            while are_there(jobs):
                stop_if_asked()
                retry_abandoned(jobs, watch)
                taken = jobs.take()
                if taken is not None:
                    done += _do(jobs, optuna.Trial(jobs, taken), run, grace)
                elif running(jobs):
                    sleep(_POLL)
                else:
                    break
        except BaseException as error:
            if isinstance(error, KeyError) and not are_there(jobs):
                return done  # the study's command has what it wants, and has put the jobs away
            if is_from_outside(error):
                release_own_trials(jobs)
            raise
    return done


def are_there(jobs: optuna.Study) -> bool:
    """Whether jobs are still those of their name: SQLite gives the number of what was put away to the next study, whose
    trials would be taken for jobs."""
    try:
        return bool(jobs._storage.get_study_id_from_name(jobs.study_name) == jobs._study_id)
    except KeyError:
        return False


def _do(jobs: RetryingStudy, job: optuna.Trial, run: Callable[[str], tuple[float, Notes]], grace: float) -> bool:
    """Whether a job was done, here and by nobody else meanwhile."""
    key = key_of(jobs._storage.get_trial(job._trial_id))
    try:
        with beating(job, grace / 4), signals.at_once():
            score, notes = run(key)
    except NasKdError as error:
        if is_from_outside(error):
            raise
        _logger.warning("a job is left to the study's own command: %s", error)
        job.set_user_attr(ERROR, str(error)[:200])
        jobs.tell(job, state=TrialState.FAIL)
        return False
    try:
        for name, value in notes.items():
            job.set_user_attr(name, value)
        jobs.tell(job, score)
    except (ValueError, UpdateFinishedTrialError):  # both mean: it is finished
        _logger.warning("a job was given to another worker: this one was silent for too long")
        return False
    return True
