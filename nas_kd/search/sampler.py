"""A sampler that never leaves the budget: a draw from what is known of each choice, and the knapsack solved on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from nas_kd.budget import KINDS, Budget
from nas_kd.errors import GenotypeError
from nas_kd.search.additive import AdditiveModel, features_of, fit
from nas_kd.search.budgets import cost_of
from nas_kd.search.own_sampler import make_own_sampler
from nas_kd.search.rungs import expected_scores
from nas_kd.search.space import Space
from nas_kd.search.starts import smallest_level, solve_in_time, tightness

_Trained = tuple[FrozenTrial, NDArray[np.int64]]  # a trial, and the positions of its choices
_MUTATIONS = 0.2  # share of proposals that vary the front, against interactions that an additive model cannot see
_APART = 0.7  # share of proposals whose bounds are lowered each by itself: the front spreads over every cost
_TRIES = 64  # to find a genotype that the study has not had


def make_sampler(name: str, space: Space[Any], seed: int) -> optuna.samplers.BaseSampler:
    """A sampler by its short name: knapsack (ours), or one of Optuna's; or by the path of the user's own."""
    return KnapsackSampler(space, seed=seed) if name == "knapsack" else make_optuna_sampler(name, seed)


def make_optuna_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """One of Optuna's samplers by its short name: tpe (multivariate), nsgaii, nsgaiii, random; or any by its path."""
    samplers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, seed=seed, n_startup_trials=8),
        "nsgaii": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=16),
        "nsgaiii": lambda: optuna.samplers.NSGAIIISampler(seed=seed, population_size=16),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    return samplers[name]() if name in samplers else make_own_sampler(name, seed)


class KnapsackSampler(optuna.samplers.BaseSampler):
    """Proposes genotypes of a `Space` within its budget, for any Optuna study whose first value is a score to maximise.

    A Bayesian additive model of the score is refitted on the finished trials, and on what is expected of those that
    were stopped at a rung; one draw from its posterior, and the knapsack solved on that draw at a random level up to
    the budget, of all bounds or of each, is the next genotype. A share of the proposals changes one or two blocks of a
    genotype on the front instead. A study with that one value gets what is best within the whole budget, or within one
    of the space's levels. `damages` (per block, over its choices; by default the space's) are the prior.
    """

    def __init__(
        self,
        space: Space[Any],
        *,
        damages: Sequence[NDArray[np.float64]] | None = None,
        seed: int | None = None,
    ) -> None:
        self.space = space
        self._damages = list(damages) if damages is not None else space.damages()
        self._features = features_of(space.blocks)
        self._seed = _entropy() if seed is None else seed
        self._generator = np.random.default_rng(self._seed)
        self._single = False
        self._fallback = optuna.samplers.RandomSampler(seed=seed)
        self._rows: dict[tuple[Any, ...], NDArray[np.int64] | None] = {}  # by the values of a trial's parameters
        base = space.table.base()
        self._budget = space.budget or Budget(tuple((kind, float(base[kind])) for kind in KINDS))
        self._least = min(1.0, smallest_level(space.table, self._budget))

    def reseed_rng(self) -> None:
        """Fresh randomness, for workers that were forked."""
        self._seed = _entropy()
        self._fallback.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of the space: they are proposed together."""
        return dict(self.space.distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the next genotype: within the budget, and new to the study where one can be found."""
        # a trial's own stream: a resumed study goes on as an uninterrupted one would have
        self._generator = np.random.default_rng([self._seed, trial.number])
        self._single = len(study.directions) == 1
        self.space.recall_latencies(study)
        had = [(other, row) for other in study.get_trials(deepcopy=False) if (row := self._row(other)) is not None]
        known = {tuple(row.tolist()) for other, row in had if not self._was_refused(other)}
        proposal = self._propose([(other, row) for other, row in had if other.state == TrialState.COMPLETE], had)
        for _ in range(_TRIES):
            if tuple(proposal.tolist()) not in known:
                break
            proposal = self._mutate(proposal)
        return self.space.point(self.space.table.genotype(proposal))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that is not of the space: at random."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def _was_refused(self, trial: FrozenTrial) -> bool:
        """Whether a trial was over a budget that the study had before, and is within the present one."""
        refused = any(trial.constraints.get(kind, 0.0) > 0 for kind in self._budget)
        return refused and trial.state == TrialState.PRUNED and self._budget.admits(cost_of(trial))

    def _row(self, trial: FrozenTrial) -> NDArray[np.int64] | None:
        """The positions of a trial's choices; None for one that is not, or not yet, of this space."""
        params = trial.params
        try:
            point = tuple([params[name] for name in self.space.distributions])
        except KeyError:
            return None
        if point not in self._rows:  # all trials are asked for at every proposal
            self._rows[point] = self._find_row(point)
        return self._rows[point]

    def _find_row(self, point: tuple[Any, ...]) -> NDArray[np.int64] | None:
        try:
            genotype = self.space.genotype(dict(zip(self.space.distributions, point, strict=True)))
        except GenotypeError:
            return None
        return self.space.table.indices(genotype)

    def _propose(self, finished: Sequence[_Trained], had: Sequence[_Trained]) -> NDArray[np.int64]:
        rows, scores = self._table([(row, trial.values[0]) for trial, row in finished])
        within = self._within(rows)
        if within.any() and self._generator.random() < _MUTATIONS:
            return self._mutate(self._on_front(rows[within], scores[within]))
        expected = expected_scores([trial for trial, _ in had])
        stopped = self._table([(row, expected[trial.number]) for trial, row in had if trial.number in expected])
        rows, scores = np.concatenate([rows, stopped[0]]), np.concatenate([scores, stopped[1]])
        return self._solve(fit(self._features, rows, scores, self._damages))

    def _table(
        self, scored: Sequence[tuple[NDArray[np.int64], float]]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Genotypes (N × blocks positions of choices) and their scores (N)."""
        rows = np.array([row for row, _ in scored], dtype=np.int64).reshape(len(scored), len(self.space.blocks))
        return rows, np.array([score for _, score in scored], dtype=np.float64)

    def _solve(self, model: AdditiveModel) -> NDArray[np.int64]:
        levels = [self._budget.scaled(self._level(self._least)), self._budget]
        if len(self._budget) > 1 and not self._single and self._generator.random() < _APART:
            levels.insert(0, self._apart())
        worth = model.draw(self._generator, boldness=self._generator.random() ** 2)
        for level in levels:
            genotype = solve_in_time(self.space.table, level, [-values for values in worth])
            if genotype is not None:
                return self.space.table.indices(genotype)
        return self._tightest()

    def _apart(self) -> Budget:
        """The budget with each bound at a random level of its own, down to what the cheapest genotype needs."""
        table = self.space.table
        least = {kind: min(1.0, table.cost(table.cheapest(kind))[kind] / bound) for kind, bound in self._budget.items()}
        return Budget(tuple((kind, bound * self._level(least[kind])) for kind, bound in self._budget.items()))

    def _level(self, least: float) -> float:
        """A random share of the budget, from `least` on: evenly over all, or over each stretch between two of the
        space's levels; where the score alone counts, one of the levels."""
        levels = [level for level in self.space.levels if level > least] or [1.0]
        if self._single:
            return levels[int(self._generator.integers(len(levels)))]
        if len(levels) == 1:
            return float(self._generator.uniform(least, 1.0))
        chosen = int(self._generator.integers(len(levels)))
        return float(self._generator.uniform(levels[chosen - 1] if chosen else least, levels[chosen]))

    def _tightest(self) -> NDArray[np.int64]:
        """The genotype that is the deepest within the budget, of the cheapest of each kind of cost."""
        table, base = self.space.table, self.space.table.base()
        cheapest = (table.cheapest(kind) for kind in self._budget)
        return table.indices(min(cheapest, key=lambda g: tightness(self.space.cost(g), self._budget, base)))

    def _within(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        totals = self.space.table.many(rows, self._budget)
        within: NDArray[np.bool_] = np.all([totals[kind] <= bound for kind, bound in self._budget.items()], axis=0)
        return within

    def _on_front(self, rows: NDArray[np.int64], scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """One of the genotypes that no other beats in the score at no more cost, at random; the best one where the
        score alone counts."""
        if self._single:
            best: NDArray[np.int64] = rows[np.argmax(scores)]
            return best
        totals = self.space.table.many(rows, self._budget)
        costs = np.stack([totals[kind] for kind in self._budget], axis=1)
        cheaper = (costs[None] <= costs[:, None]).all(axis=2)
        beaten = (cheaper & (scores[None] > scores[:, None])).any(axis=1)
        chosen: NDArray[np.int64] = rows[self._generator.choice(np.flatnonzero(~beaten))]
        return chosen

    def _mutate(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """The genotype with one or two blocks changed, still within the budget; itself when no change fits."""
        for _ in range(_TRIES):
            changed = row.copy()
            for column in self._generator.integers(len(row), size=self._generator.integers(1, 3)):
                changed[column] = self._generator.integers(len(self.space.blocks[column].choices))
            if self._within(changed[None])[0]:
                return changed
        return row


def _entropy() -> int:
    return int(np.random.default_rng().integers(2**32))
