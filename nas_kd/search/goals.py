"""What a study is after: the best score within each of many bounds, and what a genotype would add to that.

Costs are known before a student is trained, so the hypervolume of a front is the mean, over bounds drawn evenly from
the budget, of the best score within them: one rule for any number of costs, for the levels of a budget and for one
bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_ASKED = 0.5  # share of bounds that ask for less than the base has, of one kind that nobody asked for
_ROOTS = 40  # steps to the root of x^(D + 1) = x + 1, far below the rounding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Goals:
    """M bounds on D costs (M × D), and the best score so far within each (M)."""

    bounds: Array
    best: Array

    def with_points(self, scores: Array, costs: Array) -> Goals:
        """After N more genotypes with these scores (N) and costs (N × D)."""
        if not len(scores):
            return self
        reached = np.where(_within(costs, self.bounds), scores[:, None], -np.inf).max(axis=0)
        return Goals(bounds=self.bounds, best=np.maximum(self.best, reached))

    def gains(self, scores: Array, costs: Array) -> Array:
        """What each of N genotypes alone would add to the mean of the best scores; where it adds nothing, minus what it
        lacks to reach the best within the bound where it lacks least."""
        ahead = np.where(_within(costs, self.bounds), scores[:, None] - self.best, -np.inf)
        added: Array = np.maximum(ahead, 0.0).mean(axis=1)
        return np.where(added > 0, added, np.minimum(ahead.max(axis=1), 0.0))


def holders(bounds: Array, scores: Array, costs: Array) -> NDArray[np.int64]:
    """Which of N genotypes are the best within one of the bounds at least, in their order."""
    if not len(scores):
        return np.zeros(0, dtype=np.int64)
    reached = np.where(_within(costs, bounds), scores[:, None], -np.inf)
    held = reached.max(axis=0) > -np.inf
    return np.unique(reached.argmax(axis=0)[held])


def _within(costs: Array, bounds: Array) -> NDArray[np.bool_]:
    """Which of N costs (N × D) are within which of M bounds (M × D), N × M."""
    within = np.ones((len(costs), len(bounds)), dtype=bool)
    for cost, bound in zip(costs.T, bounds.T, strict=True):
        within &= cost[:, None] <= bound
    return within


def spread(count: int, dimensions: int, shift: Array) -> Array:
    """`count` points (count × D) that fill the unit cube more evenly than random ones, all moved by `shift` (D): an
    additive recurrence with the generalised golden ratio (Roberts 2018, after Schretter et al. 2016)."""
    root = 2.0
    for _ in range(_ROOTS):
        root = (1 + root) ** (1 / (dimensions + 1))
    steps = root ** -np.arange(1.0, dimensions + 1)
    points: Array = (shift + np.arange(1, count + 1)[:, None] * steps) % 1
    return points


def most_useful(goals: Goals, scores: Array, costs: Array, first: Sequence[int] = ()) -> Iterator[tuple[int, float]]:
    """All of N genotypes: the `first`, then one by one the one that adds the most to the goals, with what it adds."""
    left, forced = list(range(len(scores))), list(first)
    while left:
        gains = goals.gains(scores[left], costs[left])
        place = left.index(forced.pop(0)) if forced else int(gains.argmax())
        best = left.pop(place)
        goals = goals.with_points(scores[[best]], costs[[best]])
        yield best, float(gains[place])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Box:
    """D kinds of cost, each from the `least` that can be reached to the `most` that is allowed, at `levels` of which
    (the last is 1) something is wanted. Of kinds that are `fixed`, bounded by what the base has, it is factors that
    count, and levels do not."""

    kinds: tuple[str, ...]
    least: Array
    most: Array
    levels: tuple[float, ...] = (1.0,)
    fixed: tuple[str, ...] = ()

    def bounds(self, count: int, shift: Array | None = None) -> Array:
        """`count` bounds (count × D): on each cost evenly over each stretch between two levels, and over all of them
        alike; where it is fixed the whole of it, or for `_ASKED` of them less, evenly over the logarithm."""
        dimensions, stretches = len(self.most), len(self.levels)
        shares = spread(count, dimensions, np.full(dimensions, 0.5) if shift is None else shift)
        least = np.minimum(self.least, self.most)
        edges = np.stack([np.maximum(least, level * self.most) for level in (0, *self.levels)])
        stretch = np.minimum((stretches * shares).astype(int), stretches - 1)
        low, high = (np.take_along_axis(edges, stretch + step, axis=0) for step in (0, 1))
        between: Array = low + (stretches * shares - stretch) * (high - low)
        low, high = np.maximum(least, 1.0), np.maximum(self.most, 1.0)
        factors = low * (high / low) ** np.minimum(1, shares / _ASKED)
        return np.where([kind in self.fixed for kind in self.kinds], factors, between)

    def level(self, share: float) -> Array:
        """The bounds (D) of one level."""
        return np.where([kind in self.fixed for kind in self.kinds], self.most, share * self.most)
