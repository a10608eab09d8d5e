"""A sampler that never leaves a budget: a draw from an additive model of the score, and the knapsack solved on it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.optimize import Bounds, LinearConstraint, milp

Array = NDArray[np.float64]
_SCALES = (0.03, 0.1, 0.3, 1.0)  # standard deviations of one choice's worth, where that of the scores is 1
_NOISES = (0.03, 0.1, 0.3, 1.0)
_WHOLE = 0.2  # share of proposals that use the whole budget, where costs are objectives too
_TRIES = 4  # random bounds, until something is within them


class KnapsackSampler(optuna.samplers.BaseSampler):
    """Proposes what is within hard bounds on additive costs, in studies over categorical parameters.

    Each parameter is a choice among values, each value has a cost of each kind, and costs add up. The first objective
    of the study is a score; where there are others, they are taken to be costs, and proposals spread over their whole
    range instead of using up the budget.

    Args:
        search_space: the parameters and their values; others of a trial are drawn at random.
        costs: for each kind of cost and each parameter, what each of its values costs, in the order of the values. A
            parameter that is left out costs nothing.
        bounds: for each kind, what the sum of the costs may be at most.
        n_startup_trials: proposals that are drawn at random within the bounds before the model is asked.
        seed: decides every proposal, given the trials before it.

    Raises ValueError when the three do not fit together, or nothing is within the bounds.
    """

    def __init__(
        self,
        search_space: Mapping[str, CategoricalDistribution],
        costs: Mapping[str, Mapping[str, Sequence[float]]],
        bounds: Mapping[str, float],
        *,
        n_startup_trials: int = 8,
        seed: int | None = None,
    ) -> None:
        self._space = dict(search_space)
        self._knapsack = _Knapsack.of(self._space, costs, bounds)
        self._startup = n_startup_trials
        self._generator = np.random.default_rng(seed)
        self._others = optuna.samplers.RandomSampler(seed=seed)

    def reseed_rng(self) -> None:
        """Fresh randomness, for workers that were forked."""
        self._generator = np.random.default_rng()
        self._others.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of the knapsack: they are proposed together."""
        return dict(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point: within the bounds, and new to the study where one can be found."""
        rows, scores, known = self._seen(study)
        if len(scores) < self._startup:
            worth = self._generator.normal(size=self._knapsack.size)
            spread = True
        else:
            worth = _draw(self._knapsack.one_hot(rows), scores, self._generator)
            spread = len(study.directions) > 1 and self._generator.random() >= _WHOLE
        indices = self._solve(worth, known, spread)
        return {name: own.choices[i] for (name, own), i in zip(self._space.items(), indices, strict=True)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that is not of the knapsack: at random."""
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def _seen(self, study: optuna.Study) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
        """The points that have a score with these scores, larger is better, and all points whether finished or not."""
        sign = 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0
        ended, scores, known = [], [], []
        for trial in study.get_trials(deepcopy=False):
            if any(trial.distributions.get(name) != own for name, own in self._space.items()):
                continue
            row = [int(own.to_internal_repr(trial.params[name])) for name, own in self._space.items()]
            known.append(row)
            if trial.state == TrialState.COMPLETE:
                ended.append(row)
                scores.append(sign * trial.values[0])
        shape = (-1, len(self._space))
        return np.array(ended, np.int64).reshape(shape), np.array(scores), np.array(known, np.int64).reshape(shape)

    def _solve(self, worth: Array, known: NDArray[np.int64], spread: bool) -> NDArray[np.int64]:
        for _ in range(_TRIES if spread else 0):
            found = self._knapsack.solve(worth, self._knapsack.random_bounds(self._generator), known)
            if found is not None:
                return found
        for cuts in (known, known[:0]):  # everything within the bounds may be known
            found = self._knapsack.solve(worth, self._knapsack.bounds, cuts)
            if found is not None:
                return found
        raise RuntimeError("the solver found nothing within bounds that can be met")


@dataclass(frozen=True)
class _Knapsack:
    """One value of each parameter. All values stand in one row, parameter after parameter."""

    starts: NDArray[np.int64]  # where the values of each parameter begin, and the end
    costs: Array  # kinds × values
    bounds: Array  # kinds
    least: Array  # kinds: the smallest sum that can be had, of each alone

    @classmethod
    def of(
        cls,
        space: Mapping[str, CategoricalDistribution],
        costs: Mapping[str, Mapping[str, Sequence[float]]],
        bounds: Mapping[str, float],
    ) -> _Knapsack:
        if not space:
            raise ValueError("the search space is empty: give at least one parameter")
        if set(costs) != set(bounds):
            raise ValueError(f"costs are {sorted(costs)} and bounds {sorted(bounds)}: give both of each kind")
        lengths = [len(own.choices) for own in space.values()]
        for kind, by_parameter in costs.items():
            for name, values in by_parameter.items():
                if name not in space or len(values) != len(space[name].choices):
                    raise ValueError(f"{kind} of {name!r} must have one number for each of its values")
        rows = [
            np.concatenate([np.asarray(by.get(name, [0.0] * n), float) for name, n in zip(space, lengths, strict=True)])
            for by in costs.values()
        ]
        table = np.array(rows, float).reshape(len(costs), sum(lengths))
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        least = np.minimum.reduceat(table, starts[:-1], axis=1).sum(axis=1)
        knapsack = cls(starts, table, np.array([float(bounds[kind]) for kind in costs]), least)
        if knapsack.solve(np.zeros(sum(lengths)), knapsack.bounds, np.zeros((0, len(space)), np.int64)) is None:
            alone = {kind: float(own) for kind, own in zip(costs, least, strict=True)}
            raise ValueError(f"nothing is within {dict(bounds)}: the least of each alone is {alone}")
        return knapsack

    @property
    def size(self) -> int:
        """The number of values."""
        return int(self.starts[-1])

    def one_hot(self, rows: NDArray[np.int64]) -> Array:
        """Points as N × values of zeros and ones."""
        matrix = np.zeros((len(rows), self.size))
        np.put_along_axis(matrix, rows + self.starts[:-1], 1.0, axis=1)
        return matrix

    def random_bounds(self, generator: np.random.Generator) -> Array:
        """Bounds between what can be had and what is allowed, evenly over factors."""
        share = generator.random(len(self.bounds))
        low = np.maximum(self.least, 1e-9 * np.abs(self.bounds))
        return np.where(low > 0, low ** (1 - share) * np.maximum(self.bounds, low) ** share, self.bounds)

    def solve(self, worth: Array, bounds: Array, known: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """The point of the most worth within bounds that is not among the known ones; None where there is none."""
        counts = np.zeros((len(self.starts) - 1, self.size))
        for index, (begin, end) in enumerate(itertools.pairwise(self.starts)):
            counts[index, begin:end] = 1.0
        constraints = [LinearConstraint(counts, 1, 1)]
        if len(self.costs):
            scale = np.maximum(np.abs(self.costs).max(axis=1), 1e-300)
            constraints.append(LinearConstraint(self.costs / scale[:, None], -np.inf, bounds / scale))
        if len(known):
            constraints.append(LinearConstraint(self.one_hot(known), -np.inf, known.shape[1] - 1))
        found = milp(-worth, constraints=constraints, integrality=np.ones(self.size), bounds=Bounds(0, 1))
        if found.x is None:
            return None
        parts = np.split(found.x, self.starts[1:-1])
        indices = np.array([int(np.argmax(part)) for part in parts], np.int64)
        exact = self.costs[:, indices + self.starts[:-1]].sum(axis=1)
        return indices if np.all(exact <= bounds) else None  # the solver has a tolerance, a budget has none


def _draw(features: Array, scores: Array, generator: np.random.Generator) -> Array:
    """One guess at what each value is worth: a draw from the posterior of a Bayesian linear model, pulled towards its
    mean by a random amount, since the best of many choices under a full draw is mostly the luckiest. Scale and noise
    are those of the largest marginal likelihood."""
    centred = features - features.mean(axis=0)
    gaps = (scores - scores.mean()) / max(float(scores.std()), 1e-12)
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values, turned = np.maximum(values, 0.0), vectors.T @ gaps

    def evidence(pair: tuple[float, float]) -> float:
        spread = pair[0] ** 2 * values + pair[1] ** 2
        return float(-(turned**2 / spread).sum() - np.log(spread).sum())

    scale, noise = max(itertools.product(_SCALES, _NOISES), key=evidence)
    boldness = generator.random() ** 2
    sample = generator.normal(size=features.shape[1]) * scale * boldness
    rest = gaps - centred @ sample - generator.normal(size=len(gaps)) * noise * boldness
    spread = scale**2 * values + noise**2
    return sample + scale**2 * (centred.T @ (vectors @ ((vectors.T @ rest) / spread)))  # Matheron's rule
