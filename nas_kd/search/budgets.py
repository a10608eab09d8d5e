"""The budgets that one study is asked for, one after the other.

Space, teacher, library and recipe of a study stay, its budget may change: what is within is judged by the costs that
trials have noted, and what was trained under an earlier budget is known to the sampler, and to the front where it is
within the present one. How many students are still to be trained is counted for the present budget: those within it
that were trained when it was bounded at least as widely. So a smaller budget begins with what a larger one has, and a
larger one, whose students nobody has looked for, at none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from nas_kd.budget import BOUNDABLE, KINDS, Budget, Cost
from nas_kd.search.claims import is_trained

_BUDGETS = "budgets"  # the study's user attribute: the first trial of each budget, and its bounds


def noted_cost(trial: FrozenTrial, kinds: Sequence[str] = KINDS) -> Cost | None:
    """The cost that a trial has noted, None while any of `kinds` is missing: each is a step of its own, after any of
    which a worker may have died."""
    if any(kind not in trial.user_attrs for kind in kinds):
        return None
    return Cost(**{kind: int(trial.user_attrs[kind]) for kind in BOUNDABLE if kind in trial.user_attrs})


def cost_of(trial: FrozenTrial) -> Cost:
    """The cost of a trial that came to its end. Raises ValueError for one that has not noted it."""
    cost = noted_cost(trial)
    if cost is None:
        raise ValueError(f"trial {trial.number} has not noted what its student costs")
    return cost


def note_budget(study: optuna.Study, budget: Budget) -> None:
    """Notes that trials from here on are for this budget."""
    noted = _noted(study)
    bounds = dict(budget)
    if not noted or noted[-1][1] != bounds:
        study.set_user_attr(_BUDGETS, [*noted, [len(study.get_trials(deepcopy=False)), bounds]])


def count_trained(study: optuna.Study) -> int:
    """How many trials trained a student for the study's present budget; over-budget ones are free."""
    trained = [trial for trial in study.get_trials(deepcopy=False) if is_trained(trial)]
    noted = _noted(study)
    if len(noted) < 2:
        return len(trained)
    present = noted[-1][1]
    return sum(_counts(trial, noted, present) for trial in trained)


def _noted(study: optuna.Study) -> list[Any]:
    noted: list[Any] = study.user_attrs.get(_BUDGETS, [])
    return noted


def _counts(trial: FrozenTrial, noted: list[Any], present: dict[str, float]) -> bool:
    """Whether a trial was for the present budget, or would have been proposed for it as well."""
    budget, cost = Budget(tuple(present.items())), noted_cost(trial)
    if cost is None or not budget.admits(cost):
        return False
    own = [bounds for first, bounds in noted if first <= trial.number][-1]
    return all(kind in present and bound >= present[kind] for kind, bound in own.items())
