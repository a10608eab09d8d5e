"""A sampler that never leaves the budget: a draw from what is known of each choice, and the knapsack solved on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from nas_kd.budget import KINDS, Budget, kinds_of
from nas_kd.errors import GenotypeError
from nas_kd.genotype import Genotype
from nas_kd.search.additive import features_of
from nas_kd.search.budgets import noted_cost
from nas_kd.search.own_sampler import make_own_sampler
from nas_kd.search.proposals import Proposer, Seen, WantedGenotypes
from nas_kd.search.rungs import expected_scores
from nas_kd.search.space import Space
from nas_kd.search.workers import GENOTYPE, WORKER, undisturbed

_Trained = tuple[FrozenTrial, NDArray[np.int64]]  # a trial, and the positions of its choices


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
    were stopped at a rung. Of many genotypes within the budget, among them the knapsack's solution on one draw from the
    model's posterior, the one that adds the most to the front's hypervolume under that draw is the next; a small share
    of the proposals changes one or two blocks of a genotype on the front instead. Costs count as objectives where they
    are values of the study. A study with the score alone gets what is best within the whole budget, or within one of
    the space's levels.

    Args:
        space: What is searched; its budget, levels and library count.
        damages: The prior: per block, over its choices, how much each hurts. By default the space's.
        seed: Of the draws. A resumed study goes on as an uninterrupted one would have.

    Example:
        >>> import optuna, timm
        >>> from nas_kd import KnapsackSampler, Space
        >>> space = Space(timm.create_model("test_resnet", num_classes=10), budget="params=50%", img_size=32)
        >>> study = optuna.create_study(direction="maximize", sampler=KnapsackSampler(space, seed=0))
        >>> space.budget.admits(space.cost(space.suggest_genotype(study.ask())))
        True
    """

    def __init__(
        self,
        space: Space[Any],
        *,
        damages: Sequence[NDArray[np.float64]] | None = None,
        seed: int | None = None,
    ) -> None:
        self.space = space
        self._features = features_of(space.table, space.damages() if damages is None else damages)
        self._seed = _entropy() if seed is None else seed
        self._fallback = optuna.samplers.RandomSampler(seed=seed)
        self._rows: dict[tuple[Any, ...], NDArray[np.int64] | None] = {}  # by the values of a trial's parameters
        base = space.table.base()
        self._budget = space.budget or Budget(tuple((kind, float(base[kind])) for kind in KINDS))

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
        (proposer,) = self._proposers(study, [trial.number])
        return self.space.point(self.space.table.genotype(proposer.propose(proposer.seek(), self._table(()))))

    def propose(self, study: optuna.Study, count: int, beside: Sequence[Genotype] = ()) -> list[Genotype]:
        """The next genotypes, for trials that run at the same time: each as if those before it, and those `beside` it,
        were in training. What is sought is solved for several at a time, as the solver lets go of Python."""
        table, first = self.space.table, len(study.get_trials(deepcopy=False))
        proposers = self._proposers(study, range(first, first + count))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sought = list(pool.map(Proposer.seek, proposers))
        rows = [table.indices(genotype) for genotype in beside]
        for proposer, own in zip(proposers, sought, strict=True):
            rows.append(proposer.propose(own, self._table(rows)))
        return [table.genotype(row) for row in rows[len(beside) :]]

    def _proposers(self, study: optuna.Study, numbers: Iterable[int]) -> list[Proposer]:
        """What proposes the genotypes of the trials of these numbers."""
        self.space.recall_latencies(study)
        trials = undisturbed(study.get_trials(deepcopy=False))
        had = [(other, row) for other in trials if (row := self._row(other)) is not None]
        wanted = WantedGenotypes(
            table=self.space.table,
            budget=self._budget,
            levels=self.space.levels,
            kinds=self._objectives(had, len(study.directions) - 1),
        )
        seen, failed = self._seen(had), [other.number for other in trials if other.state == TrialState.FAIL]
        # a trial's own stream: a resumed study goes on as an uninterrupted one would have, which has none that failed
        places = (number - sum(other < number for other in failed) for number in numbers)
        return [Proposer(wanted, self._features, seen, np.random.default_rng([self._seed, own])) for own in places]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that is not of the space: at random."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def _was_refused(self, trial: FrozenTrial) -> bool:
        """Whether a trial was over a budget that the study had before, and is within the present one."""
        refused = any(trial.constraints.get(kind, 0.0) > 0 for kind in self._budget)
        cost = noted_cost(trial, tuple(self._budget)) if refused and trial.state == TrialState.PRUNED else None
        return cost is not None and self._budget.admits(cost)

    def _row(self, trial: FrozenTrial) -> NDArray[np.int64] | None:
        """The positions of a trial's choices; None for one that is not, or not yet, of this space, or whose worker died
        as it was told them: they may be proposed again."""
        params = trial.params
        if trial.state == TrialState.FAIL and WORKER in trial.user_attrs and GENOTYPE not in trial.user_attrs:
            return None
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

    def _seen(self, had: Sequence[_Trained]) -> Seen:
        """What is known of the study's genotypes."""
        expected = expected_scores([trial for trial, _ in had])
        ended = [(trial.values[0], row) for trial, row in had if trial.state == TrialState.COMPLETE]
        stopped = [(expected[trial.number], row) for trial, row in had if trial.number in expected]
        return Seen(
            ended=self._table([row for _, row in ended]),
            scores=np.array([score for score, _ in ended], dtype=np.float64),
            stopped=self._table([row for _, row in stopped]),
            expected=np.array([score for score, _ in stopped], dtype=np.float64),
            running=self._table([row for trial, row in had if trial.state == TrialState.RUNNING]),
            known=frozenset(row.tobytes() for trial, row in had if not self._was_refused(trial)),
        )

    def _table(self, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Genotypes as N × blocks positions of choices."""
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.space.blocks))

    def _objectives(self, had: Sequence[_Trained], count: int) -> tuple[str, ...]:
        """The kinds of cost that are values of the study, after the score: those that finished trials have as values;
        where none are found, those of the command line."""
        ended = [(trial.values[1:], row) for trial, row in had if trial.state == TrialState.COMPLETE]
        usual = kinds_of(self._budget)
        if count in (0, len(usual)) or not ended:
            return usual[:count]
        values = np.array([values for values, _ in ended], dtype=np.float64)
        totals = self.space.table.many(self._table([row for _, row in ended]), usual)
        found = [kind for kind in usual if (values == totals[kind][:, None]).all(axis=0).any()]
        return tuple(found) or usual[:count]


def _entropy() -> int:
    return int(np.random.default_rng().integers(2**32))
