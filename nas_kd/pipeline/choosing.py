"""Which genotypes of a study become models of the results: its front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from nas_kd.budget import Budget, kinds_of
from nas_kd.errors import TrainingError
from nas_kd.genotype import Genotype
from nas_kd.search.budgets import noted_cost
from nas_kd.search.goals import Box, Goals, most_useful
from nas_kd.search.trials import cost_of, values_of
from nas_kd.search.workers import GENOTYPE

_LEAST_FRONT = 5  # models that a study gives, from what lies behind the front if need be
_BOUNDS = 1024  # that stand for the budget
_BELOW = 0.1  # of the range of scores, how far below the worst gains begin: the cheapest counts as well


def choose_front(
    study: optuna.Study, count: int, budget: Budget | None = None, levels: Sequence[float] = ()
) -> list[Genotype]:
    """Up to `count` genotypes of the study within a budget: the best score among them first, the best within each of
    `levels` (shares of the budget), and then those that add the most to the front, over all costs that are compared.

    Where the front has fewer than five, it is filled up from what lies behind it. Raises TrainingError when no trial
    came to its end.
    """
    trials = _finished(study, budget)
    inside = [[trial for trial in trials if budget and budget.scaled(level).admits(cost_of(trial))] for level in levels]
    needed = [min(own, key=_rank) for own in (trials, *inside) if own]
    first = [trials.index(trial) for trial in {trial.number: trial for trial in needed}.values()]
    kinds = kinds_of(budget)
    values = np.array([values_of(trial, budget) for trial in trials], dtype=np.float64)
    scores, costs = values[:, 0], values[:, 1:]
    box = Box(
        kinds=kinds,
        least=costs.min(axis=0),
        most=np.array([dict(budget or {}).get(kind, own) for kind, own in zip(kinds, costs.max(axis=0), strict=True)]),
        levels=tuple(levels) or (1.0,),
        fixed=budget.fixed if budget else (),
    )
    bounds = np.concatenate([box.bounds(_BOUNDS), box.most[None]])
    goals = Goals(bounds=bounds, best=np.full(len(bounds), scores.min() - _BELOW * max(np.ptp(scores), 1e-3)))
    ordered = list(most_useful(goals, scores, costs, first))[: max(count, len(first))]
    chosen = [
        number
        for place, (number, gain) in enumerate(ordered)
        if gain > 0 or place < max(len(first), min(count, _LEAST_FRONT))
    ]
    return [Genotype.from_json(trials[number].user_attrs[GENOTYPE]) for number in chosen]


def _finished(study: optuna.Study, budget: Budget | None) -> list[FrozenTrial]:
    """The trials within the budget that came to their end, each genotype once, best first."""
    ended = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if _is_noted(trial)]
    ended = [trial for trial in ended if budget is None or budget.admits(cost_of(trial))]
    if not ended:
        raise TrainingError(
            f"none of the trials of {study.study_name!r} came to its end: lower --lr, or train more of them"
        )
    return sorted({trial.user_attrs["digest"]: trial for trial in reversed(ended)}.values(), key=_rank)


def _is_noted(trial: FrozenTrial) -> bool:
    """Whether a trial says what it trained and what that costs."""
    return {"digest", GENOTYPE} <= trial.user_attrs.keys() and noted_cost(trial) is not None


def _rank(trial: FrozenTrial) -> tuple[float, float]:
    """The better of two trials has less: its score, then its parameters."""
    return -trial.values[0], cost_of(trial).params
