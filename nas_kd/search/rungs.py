"""When a trial stops early: at a rung where enough cheaper trials were already better.

Optuna's own pruners refuse studies with several objectives, so the rule is ours: asynchronous successive halving over
the front, one comparison per rung, tested without a study. A study with one objective has Optuna's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, TrialState

from nas_kd.budget import KINDS, Cost

PATIENCE = 3  # better and no dearer trials at a rung before a trial stops there
EVIDENCE = 4  # trials that came to their end before it is asked what a rung says of it


@dataclass(frozen=True, slots=True, kw_only=True)
class RungScore:
    """What a trial of this cost scored at a rung, and at its end if it has come to it."""

    cost: Cost
    score: float
    end: float | None = None


def rung_epochs(epochs: int) -> tuple[int, ...]:
    """The epochs after which a proxy of `epochs` is looked at: powers of two, and the last.

    >>> rung_epochs(6)
    (1, 2, 4, 6)
    """
    powers = [2**power for power in range(epochs.bit_length()) if 2**power < epochs]
    return (*powers, epochs)


def rung_scores(attributes: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """(epoch, score) at each rung that is noted among a trial's user attributes, in the order of training."""
    rungs = ((int(name.split("/")[1]), score) for name, score in attributes.items() if name.startswith("rung/"))
    return tuple(sorted(rungs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What scores at a rung say of the end, by those that came to it: a line, flatter the less they say, and the
    standard deviation around it."""

    rung: float  # mean score at the rung
    end: float  # mean score at the end
    slope: float  # 0 to 1
    spread: float

    def expected(self, score: float) -> float:
        """What a score at the rung is expected to come to."""
        return self.end + self.slope * (score - self.rung)

    @property
    def doubt(self) -> float:
        """How far apart two scores at the rung must be for the ends to differ by the spread."""
        return self.spread / self.slope if self.slope > 0 else math.inf


def outlook(pairs: Sequence[tuple[float, float]]) -> Outlook:
    """Of scores at a rung and at the end: least squares, of at least one pair."""
    rung, end = fmean(rung for rung, _ in pairs), fmean(end for _, end in pairs)
    across = sum((one - rung) ** 2 for one, _ in pairs)
    together = sum((one - rung) * (other - end) for one, other in pairs)
    slope = min(1.0, max(0.0, together / across)) if across > 0 else 1.0
    left = sum((other - end - slope * (one - rung)) ** 2 for one, other in pairs)
    return Outlook(rung=rung, end=end, slope=slope, spread=math.sqrt(left / max(1, len(pairs) - 2)))


def expected_scores(trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """By their numbers, what trials that were stopped at a rung would have come to, by the outlook there; nothing where
    none of those that came to their end was looked at."""
    pairs: dict[int, list[tuple[float, float]]] = {}
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            for epoch, score in _course(trial):
                pairs.setdefault(epoch, []).append((score, trial.values[0]))
    outlooks = {epoch: outlook(at_rung) for epoch, at_rung in pairs.items()}
    stopped = [(trial.number, _course(trial)) for trial in trials if trial.state == TrialState.PRUNED]
    last = [(number, *course[-1]) for number, course in stopped if course and course[-1][0] in outlooks]
    return {number: outlooks[epoch].expected(score) for number, epoch, score in last}


def _course(trial: FrozenTrial) -> tuple[tuple[int, float], ...]:
    """(epoch, score) as a trial noted it, or as it reported it to Optuna."""
    return rung_scores(trial.user_attrs) or tuple(sorted(trial.intermediate_values.items()))


def make_pruner(name: str, epochs: int) -> BasePruner:
    """One of Optuna's pruners by its short name, for trials that report after `rung_epochs(epochs)`: sha, hyperband,
    median; one that stops nothing for any other."""
    pruners: Mapping[str, Callable[[], BasePruner]] = {
        "sha": lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),  # rungs double
        "hyperband": lambda: HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=2),
        "median": lambda: MedianPruner(n_startup_trials=5),
    }
    return pruners.get(name, NopPruner)()


def deficit(
    own: RungScore, peers: Sequence[RungScore], patience: int = PATIENCE, kinds: Sequence[str] = KINDS
) -> float:
    """How far a trial is behind at a rung: > 0 when at least `patience` peers that cost no more in any of `kinds`
    scored more, by how much the worst of the best `patience` of them did; else ≤ 0.

    They must have scored more by the doubt of the rung at least, and `EVIDENCE` peers have come to their end, or nobody
    knows what the rung says of it.
    """
    rivals = sorted((peer.score for peer in peers if _no_dearer(peer.cost, own.cost, kinds)), reverse=True)
    ended = [(peer.score, peer.end) for peer in peers if peer.end is not None]
    if len(rivals) < patience or len(ended) < EVIDENCE:
        return 0.0
    behind = rivals[patience - 1] - own.score
    return behind if behind > outlook(ended).doubt else min(behind, 0.0)


def _no_dearer(cost: Cost, other: Cost, kinds: Sequence[str]) -> bool:
    return all(cost[kind] <= other[kind] for kind in kinds)
