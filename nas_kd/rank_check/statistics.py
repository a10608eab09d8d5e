"""How far a score can be trusted to rank: Kendall's τ-b with a bootstrap interval, and regret. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]
LEVEL = 0.9  # of the intervals
RESAMPLES = 4000
TOP = (1, 3)  # k of the top-k regrets
DAMAGE_EXPONENT = 0.2
SIZE_EXPONENT = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How a score's order agrees with the truth's.

    `tau`, Kendall's τ-b, −1 to 1, with its bootstrap interval `low` to `high`; NaN where all scores are equal.
    `regrets`, for each k of `TOP` the truth of the best minus that of the best among the k that the score puts first.
    """

    tau: float
    low: float
    high: float
    regrets: tuple[float, ...]


def allowing_for_size(loss: float, params: int) -> float:
    """A loss (or error) after a short training as an order of what a long one leaves: loss · params^-0.15.

    Short trainings may favour small students, which learn fast and have less to gain afterwards. On a ResNet-20 this
    ranked better than the loss, on a MobileNetV2 worse, so that a rank check measures it and no study ranks by it
    (docs/decisions.md).
    """
    return float(loss * params**-SIZE_EXPONENT)


def allowing_for_damage(loss: float, damage: float) -> float:
    """A loss (or error) after a short training, and what the library says of the same student: loss · damage^0.2.

    Two measurements with errors of their own. Among random students this ranked better than the loss, among students
    near the optimum, which had been chosen by that damage, worse, so that a rank check measures it and no study ranks
    by it (docs/decisions.md).
    """
    return float(loss * max(damage, 0.0) ** DAMAGE_EXPONENT)


def agreement(scores: ArrayLike, truth: ArrayLike, *, seed: int) -> Agreement:
    """Compares N scores with N truths (higher is better in both; a score that is not finite is the worst)."""
    ranked, true = _ranked(scores), np.asarray(truth, dtype=np.float64)
    low, high = tau_interval(ranked, true, seed=seed)
    regrets = tuple(top_regret(ranked, true, k) for k in TOP)
    return Agreement(tau=kendall_tau(ranked, true), low=low, high=high, regrets=regrets)


def kendall_tau(scores: ArrayLike, truth: ArrayLike) -> float:
    """Kendall's τ-b: (concordant − discordant pairs) / √(pairs not tied in one × pairs not tied in the other).

    NaN where all of one side are tied.

    >>> kendall_tau([1, 2, 3, 4], [1, 3, 2, 4])  # 5 pairs agree, 1 does not
    0.6666666666666666
    """
    return float(_taus(_ranked(scores), np.asarray(truth, dtype=np.float64), None)[0])


def tau_interval(
    scores: ArrayLike, truth: ArrayLike, *, seed: int, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The percentile bootstrap interval of `kendall_tau` over the genotypes; NaN where τ is."""
    ranked, true = _ranked(scores), np.asarray(truth, dtype=np.float64)
    taus = _taus(ranked, true, _resampled(len(true), seed, resamples))
    return _interval(taus, level)


def tau_difference(
    scores: ArrayLike, others: ArrayLike, truth: ArrayLike, *, seed: int, level: float = LEVEL
) -> tuple[float, float]:
    """The interval of τ(scores) − τ(others), from resamples that both share: above 0, the first ranks better."""
    true = np.asarray(truth, dtype=np.float64)
    counts = _resampled(len(true), seed, RESAMPLES)
    return _interval(_taus(_ranked(scores), true, counts) - _taus(_ranked(others), true, counts), level)


def top_regret(scores: ArrayLike, truth: ArrayLike, k: int) -> float:
    """The truth of the best minus the truth of the best among the k of the highest scores; 0 is perfect.

    Ties count against the score: of equal ones those of the lower truth come first.

    >>> top_regret([3, 2, 1], [0.5, 0.9, 0.8], 1)
    0.4
    """
    ranked, true = _ranked(scores), np.asarray(truth, dtype=np.float64)
    first = np.lexsort((true, -ranked))[:k]
    return float(true.max() - true[first].max())


def _ranked(scores: ArrayLike) -> Numbers:
    """The scores with those that are not finite below all others."""
    values = np.asarray(scores, dtype=np.float64)
    finite = values[np.isfinite(values)]
    worst = (float(finite.min()) if len(finite) else 0.0) - 1.0
    return np.asarray(np.where(np.isfinite(values), values, worst), dtype=np.float64)


def _resampled(count: int, seed: int, resamples: int) -> Numbers:
    """How often each of `count` is drawn, resamples × count."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn.astype(np.float64)


def _taus(scores: Numbers, truth: Numbers, counts: Numbers | None) -> Numbers:
    """τ-b of every resample; a genotype that was drawn twice is tied with itself."""
    if counts is None:
        counts = np.ones((1, len(truth)))
    order, true_order = (np.sign(values[:, None] - values[None, :]) for values in (scores, truth))

    def pairs(signs: Numbers) -> Numbers:
        total: Numbers = ((counts @ signs) * counts).sum(axis=1)
        return total

    untied = pairs(order**2) * pairs(true_order**2)
    taus = np.divide(pairs(order * true_order), np.sqrt(untied), out=np.full(len(counts), np.nan), where=untied > 0)
    return np.asarray(taus, dtype=np.float64)


def _interval(values: Numbers, level: float) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    ends: Sequence[float] = np.quantile(known, ((1 - level) / 2, (1 + level) / 2)).tolist()
    return ends[0], ends[1]
