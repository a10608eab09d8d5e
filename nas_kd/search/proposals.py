"""The next genotype: of many within the budget, the one that adds the most to the front under one draw of the score.

The many are the knapsack's solution on that draw at a random level, genotypes on the front with blocks changed or
crossed, and then whatever lies around the best of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nas_kd.budget import Budget
from nas_kd.costs.cost_table import CostTable
from nas_kd.search.additive import Belief, ChoiceFeatures, fit_scores
from nas_kd.search.goals import Array, Box, Goals, holders
from nas_kd.search.starts import solve_in_time, tightness
from nas_kd.search.variations import Rows, change, neighbours, vary

_MUTATIONS = 0.1  # share of proposals that vary the front at random, against what the model cannot see
_WHOLE = 0.2  # share of proposals that look for the best within the whole budget, or within a level, alone
_BOUNDS = 256  # random bounds that stand for the budget
_VARIED = 128  # variations of the front, and then of the best so far
_CLIMBS = 2  # how often what is around the best is looked at
_TRIES = 64  # changes that are tried to find a genotype within the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedGenotypes:
    """Within what genotypes are wanted, at which `levels` of it, and the `kinds` of cost that are objectives beside the
    score; none where the score alone counts."""

    table: CostTable
    budget: Budget
    levels: tuple[float, ...]
    kinds: tuple[str, ...]

    def admits(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of N genotypes are within the budget."""
        over = self.table.priced(rows, tuple(self.budget)) > np.array(list(self.budget.values()))
        return ~np.asarray(over.any(axis=1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What a study has: genotypes that came to their end and those that were stopped at a rung, with the scores of the
    first and what is expected of the others; those still in training; and the bytes of all, which are not proposed
    again."""

    ended: Rows
    scores: Array
    stopped: Rows
    expected: Array
    running: Rows
    known: frozenset[bytes]

    def beside(self, rows: Rows) -> Seen:
        """The same while these are in training, too."""
        known = self.known | {row.tobytes() for row in rows}
        return replace(self, running=np.concatenate([self.running, rows]), known=known)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sought:
    """What a proposal is looked for by: a draw of the score, and the knapsack's `solution` on it."""

    belief: Belief
    solution: NDArray[np.int64]


class Proposer:
    """Proposes one genotype after what a study has `seen`, in two steps: what is to be sought, which takes the longest
    and does not depend on what else is in training, and then the genotype."""

    def __init__(
        self, wanted: WantedGenotypes, features: ChoiceFeatures, seen: Seen, generator: np.random.Generator
    ) -> None:
        self.wanted, self.features, self.seen, self.generator = wanted, features, seen, generator
        self.table, self.kinds = wanted.table, wanted.kinds or tuple(wanted.budget)
        within = wanted.admits(seen.ended)
        self.rows, self.scores = seen.ended[within], seen.scores[within]
        self.costs = self._costs(self.rows)
        self.cheapest = _cheapest(self.table, self.kinds)
        self.bounds = self._draw_bounds()
        self.front = holders(self.bounds, self.scores, self.costs)

    def seek(self) -> Sought | None:
        """What is to be sought; None for a proposal that varies the front at random."""
        if len(self.rows[self.front]) and self.generator.random() < _MUTATIONS:
            return None
        scored = np.concatenate([self.seen.ended, self.seen.stopped])
        model = fit_scores(self.features, scored, np.concatenate([self.seen.scores, self.seen.expected]))
        belief = model.draw(self.generator, boldness=self.generator.random() ** 2)
        return Sought(belief=belief, solution=self._solve(belief))

    def propose(self, sought: Sought | None, beside: Rows) -> NDArray[np.int64]:
        """A genotype within the budget, and new to the study and to what is proposed `beside` it where one can be
        found."""
        self.seen, front = self.seen.beside(beside), self.rows[self.front]
        if sought is None:
            return self._new(self.generator.choice(front))
        belief, solution = sought.belief, sought.solution
        goals = self._goals(belief)
        parents = np.concatenate([solution[None], front])
        pool = np.concatenate([solution[None], vary(self.table, parents, _VARIED, self.generator)])
        best = self._best(pool, belief, goals)
        return self._new(solution) if best is None else self._climb(best, belief, goals)

    def _draw_bounds(self) -> Array:
        """Within which the best scores are wanted: random bounds on each cost, from the least reachable to the budget;
        or now and then, and always where the score alone counts, one level of the budget."""
        budget, levels = self.wanted.budget, self.wanted.levels
        least = self._costs(self.cheapest).min(axis=0)
        # what has no bound is of interest up to the dearest so far
        dearest = self.costs.max(axis=0) if len(self.rows) else self._base()
        most = np.array([budget.get(kind, own) for kind, own in zip(self.kinds, dearest, strict=True)])
        box = Box(kinds=self.kinds, least=least, most=most, levels=levels, fixed=budget.fixed)
        if self.wanted.kinds and self.generator.random() >= _WHOLE:
            return box.bounds(_BOUNDS, self.generator.random(len(most)))
        reachable = [level for level in levels if (box.level(level) >= least).all()] or [1.0]
        return box.level(reachable[int(self.generator.integers(len(reachable)))])[None]

    def _goals(self, belief: Belief) -> Goals:
        """What is reached within the bounds: at the least what the cheapest genotypes are believed to score. Genotypes
        in training count as what they are believed to score."""
        floor = min([*self.scores, *belief.scores(self.cheapest)])
        goals = Goals(bounds=self.bounds, best=np.full(len(self.bounds), floor))
        running = self.seen.running[self.wanted.admits(self.seen.running)]
        reached = goals.with_points(self.scores[self.front], self.costs[self.front])
        return reached.with_points(belief.scores(running), self._costs(running))

    def _solve(self, belief: Belief) -> NDArray[np.int64]:
        """The knapsack on these beliefs within one of the bounds."""
        bounds = self.bounds[self.generator.integers(len(self.bounds))]
        bound = dict(zip(self.kinds, bounds.tolist(), strict=True))
        level = Budget(tuple((kind, bound.get(kind, most)) for kind, most in self.wanted.budget.items()))
        for within in (level, self.wanted.budget):
            genotype = solve_in_time(self.table, within, [-worth for worth in belief.worth])
            if genotype is not None:
                return self.table.indices(genotype)
        return self._tightest()

    def _climb(self, row: NDArray[np.int64], belief: Belief, goals: Goals) -> NDArray[np.int64]:
        """The best around a genotype, and around that, until there is none better."""
        for _ in range(_CLIMBS):
            around = (row[None], neighbours(self.table, row), vary(self.table, row[None], _VARIED, self.generator))
            best = self._best(np.concatenate(around), belief, goals)
            if best is None or (best == row).all():
                break
            row = best
        return row

    def _best(self, rows: Rows, belief: Belief, goals: Goals) -> NDArray[np.int64] | None:
        """Of the genotypes that are within the budget and new, the one that gains the most."""
        rows = rows[self.wanted.admits(rows)]
        rows = rows[[row.tobytes() not in self.seen.known for row in rows]]
        if not len(rows):
            return None
        best: NDArray[np.int64] = rows[goals.gains(belief.scores(rows), self._costs(rows)).argmax()]
        return best

    def _new(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """The genotype changed until it is within the budget and new; itself when that is not found."""
        changed = row
        for _ in range(_TRIES):
            tried = change(self.table, changed[None], self.generator)
            if not self.wanted.admits(tried)[0]:
                continue
            changed = np.asarray(tried[0])
            if changed.tobytes() not in self.seen.known:
                return changed
        return row

    def _costs(self, rows: Rows) -> Array:
        return self.table.priced(rows, self.kinds)

    def _base(self) -> Array:
        base = self.table.base()
        return np.array([base[kind] for kind in self.kinds], dtype=np.float64)

    def _tightest(self) -> NDArray[np.int64]:
        """The genotype that is the deepest within the budget, of the cheapest of each kind of cost."""
        budget, base = self.wanted.budget, self.table.base()
        cheapest = (self.table.cheapest(kind) for kind in budget)
        return self.table.indices(
            min(cheapest, key=lambda genotype: tightness(self.table.cost(genotype), budget, base))
        )


@functools.lru_cache(maxsize=2)  # a study asks at every proposal
def _cheapest(table: CostTable, kinds: tuple[str, ...]) -> Rows:
    """The cheapest genotype of each kind of cost."""
    return np.stack([table.indices(table.cheapest(kind)) for kind in kinds])
