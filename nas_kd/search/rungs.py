"""When a trial stops early: at a rung where enough cheaper trials were already better.

Optuna's own pruners refuse studies with several objectives, so the rule is ours: asynchronous successive halving over
the front, one comparison per rung, tested without a study. A study with one objective has Optuna's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, TrialState

from nas_kd.budget import KINDS, Cost

PATIENCE = 3  # better and no dearer trials at a rung before a trial stops there


@dataclass(frozen=True, slots=True, kw_only=True)
class RungScore:
    """What a trial of this cost scored at a rung."""

    cost: Cost
    score: float


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


def expected_scores(trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """By their numbers, what trials that were stopped at a rung would have come to: their score there, and what those
    that came to their end gained from there on, on average; nothing where none of these was looked at."""
    gains: dict[int, list[float]] = {}
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            for epoch, score in _course(trial):
                gains.setdefault(epoch, []).append(trial.values[0] - score)
    stopped = [(trial.number, _course(trial)) for trial in trials if trial.state == TrialState.PRUNED]
    last = [(number, *course[-1]) for number, course in stopped if course and course[-1][0] in gains]
    return {number: score + fmean(gains[epoch]) for number, epoch, score in last}


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
    own: RungScore, peers: Iterable[RungScore], patience: int = PATIENCE, kinds: Sequence[str] = KINDS
) -> float:
    """How far a trial is behind at a rung: > 0 when at least `patience` peers that cost no more in any of `kinds`
    scored more, by how much the worst of the best `patience` of them did; else ≤ 0."""
    rivals = sorted((peer.score for peer in peers if _no_dearer(peer.cost, own.cost, kinds)), reverse=True)
    if len(rivals) < patience:
        return 0.0
    return rivals[patience - 1] - own.score


def _no_dearer(cost: Cost, other: Cost, kinds: Sequence[str]) -> bool:
    return all(cost[kind] <= other[kind] for kind in kinds)
