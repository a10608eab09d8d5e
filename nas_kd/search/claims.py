"""No genotype is trained twice, however many workers propose it at once: each claims its digest before it trains.

All that workers share is the study's storage: no locks, but what one has written every later read finds. A trial writes
its digest, then reads the others. Whoever finds an earlier trial with this digest, or one that trains it, leaves it;
whoever finds a later, undecided one waits for it to decide, since that one may have read before the digest was written.
The latest never waits, so some trial always goes on; one whose worker died before it decided is given up meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import optuna
from optuna.trial import FrozenTrial, TrialState

from nas_kd.search.workers import Watch, retry_dead_trials

CLAIM = "claim"  # the user attribute of a trial that may train its digest
REUSED = "reused"  # the user attribute of a trial whose digest another has or trains: its number
RUNG = "rung"  # the constraint of every trial that trained
_WAIT = 0.05  # seconds between two looks at a trial that is about to decide


def is_trained(trial: FrozenTrial) -> bool:
    """Whether a trial trained anything, were it in vain: it is finished, was within budget and did not reuse another's
    result."""
    finished = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    return finished and RUNG in trial.constraints and REUSED not in trial.user_attrs


def claim(trial: optuna.Trial, digest: str, *, sleep: Callable[[float], None] = time.sleep) -> FrozenTrial | None:
    """None when the trial, which has noted its `digest`, is the one to train it; else the trial that did or does."""
    watch = Watch()
    while True:
        rivals = [other for other in trial.study.get_trials(deepcopy=False) if _is_rival(other, trial.number, digest)]
        for other in sorted(rivals, key=lambda other: (not is_trained(other), other.number)):
            if other.state.is_finished() or CLAIM in other.user_attrs or other.number < trial.number:
                return other
        if not rivals:
            trial.set_user_attr(CLAIM, True)
            return None
        sleep(_WAIT)
        retry_dead_trials(trial.study)
        watch.retry_silent_trials(trial.study)


def _is_rival(other: FrozenTrial, number: int, digest: str) -> bool:
    if other.number == number or other.user_attrs.get("digest") != digest or REUSED in other.user_attrs:
        return False
    return other.state == TrialState.RUNNING or is_trained(other)
