"""Several levels of one budget, and several budgets of one study."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from torch import nn

from nas_kd.budget import Budget, Cost
from nas_kd.errors import BudgetError
from nas_kd.pipeline.choosing import choose_front
from nas_kd.search.budgets import count_trained, note_budget
from nas_kd.search.sampler import KnapsackSampler
from nas_kd.search.space import Space
from nas_kd.search.starts import tightness
from nas_kd.search.trials import RUNG

Within = Callable[[Space[nn.Module], str | Budget], Space[nn.Module]]
LEVELS = (0.25, 0.5, 1.0)


def shares(space: Space[nn.Module], costs: list[Cost]) -> np.ndarray[Any, Any]:
    return np.array([tightness(cost, space.budget, space.table.base()) for cost in costs])


def run(study: optuna.Study, space: Space[nn.Module], trials: int) -> None:
    """Trials whose score is how much of the base's parameters they keep."""

    def objective(trial: optuna.Trial) -> tuple[float, float, float]:
        genotype = space.suggest_genotype(trial)
        trial.set_user_attr("genotype", genotype.to_json())
        cost = space.admit(trial, genotype)
        trial.set_constraint(RUNG, 0.0)
        return cost.params / space.table.base().params, float(cost.params), float(cost.macs)

    study.optimize(objective, n_trials=trials)


def new_study(space: Space[nn.Module], study: optuna.Study | None = None) -> optuna.Study:
    sampler = KnapsackSampler(space, seed=3)
    if study is None:
        return optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
    study.sampler = sampler
    return study


def test_starts_hold_one_at_each_level(resnet: Space[nn.Module], within: Within) -> None:
    space = within(resnet, "params=2M").with_levels(LEVELS)
    used = shares(space, [space.cost(start) for start in space.starts(8)])
    assert (used <= 1).all()
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0)):
        assert ((used > low) & (used <= high)).any()
    assert any(0.24 < share <= 0.25 for share in used)  # not just below it: the level is used up


def test_proposals_spread_over_the_levels(resnet: Space[nn.Module], within: Within) -> None:
    space = within(resnet, "params=2M").with_levels(LEVELS)
    study = new_study(space)
    run(study, space, 24)
    trials = study.get_trials(deepcopy=False)
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    used = shares(space, [Cost(params=t.user_attrs["params"], macs=t.user_attrs["macs"]) for t in trials])
    assert [((used > low) & (used <= high)).sum() >= 3 for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 1))] == 3 * [
        True
    ]


def test_the_front_holds_the_best_of_each_level(resnet: Space[nn.Module], within: Within) -> None:
    space = within(resnet, "params=2M").with_levels(LEVELS)
    assert space.budget is not None
    study = new_study(space)
    run(study, space, 24)
    chosen = choose_front(study, 3, space.budget, LEVELS)
    assert len(chosen) == 3
    scores = [trial.values[0] for trial in study.get_trials(deepcopy=False)]
    costs = [space.cost(genotype) for genotype in chosen]
    for level in LEVELS:
        bound = space.budget["params"] * level
        best = max(score for score in scores if score * space.table.base().params <= bound)
        held = max(cost.params for cost in costs if cost.params <= bound)
        assert held / space.table.base().params == pytest.approx(best)


def test_a_level_that_no_student_reaches(resnet: Space[nn.Module], within: Within) -> None:
    space = within(resnet, "params=1M")
    with pytest.raises(BudgetError, match=r"no student of resnet18 is within params=1K: the smallest reachable is"):
        space.with_levels((0.001, 1.0))


def test_a_smaller_budget_begins_with_what_the_larger_has(resnet: Space[nn.Module], within: Within) -> None:
    wide, narrow = within(resnet, "params=2M"), within(resnet, "params=1M")
    assert wide.budget is not None
    assert narrow.budget is not None
    study = new_study(wide)
    note_budget(study, wide.budget)
    run(study, wide, 12)
    assert count_trained(study) == 12
    note_budget(study, narrow.budget)
    small = sum(trial.user_attrs["params"] <= 1e6 for trial in study.get_trials(deepcopy=False))
    assert 0 < count_trained(study) == small < 12
    before = len(study.get_trials(deepcopy=False))
    run(new_study(narrow, study), narrow, 6)
    new = study.get_trials(deepcopy=False)[before:]
    assert all(trial.user_attrs["params"] <= 1e6 for trial in new)
    assert all(narrow.cost(genotype).params <= 1e6 for genotype in choose_front(study, 8, narrow.budget))
    digests = [trial.user_attrs["digest"] for trial in study.get_trials(deepcopy=False)]
    assert len(set(digests)) == len(digests)  # nothing is trained again


def test_a_larger_budget_wants_students_of_its_own(resnet: Space[nn.Module], within: Within) -> None:
    wide, narrow = within(resnet, "params=2M"), within(resnet, "params=1M")
    assert wide.budget is not None
    assert narrow.budget is not None
    study = new_study(narrow)
    note_budget(study, narrow.budget)
    run(study, narrow, 5)
    note_budget(study, wide.budget)
    assert count_trained(study) == 0
    run(new_study(wide, study), wide, 4)
    assert count_trained(study) == 4
    note_budget(study, narrow.budget)
    assert count_trained(study) >= 5


def test_what_an_earlier_budget_refused_may_be_proposed(resnet: Space[nn.Module], within: Within) -> None:
    wide, narrow = within(resnet, "params=2M"), within(resnet, "params=1M")
    sampler = KnapsackSampler(wide, seed=0)
    study = new_study(narrow)
    study.enqueue_trial(narrow.point(wide.starts(8)[-1]))
    run(study, narrow, 1)
    (refused,) = study.get_trials(deepcopy=False)
    assert refused.state == TrialState.PRUNED
    assert sampler._was_refused(refused)
    assert not KnapsackSampler(narrow, seed=0)._was_refused(refused)
