"""Bounds at what the base has: nothing that is worse, and no wish."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import optuna
import pytest
import timm
from torch import nn

from nas_kd.budget import Budget, Cost, parse_budget
from nas_kd.errors import BudgetError
from nas_kd.pipeline.choosing import choose_front
from nas_kd.search.goals import Box, Goals, most_useful
from nas_kd.search.options import parse_options
from nas_kd.search.space import Space

Within = Callable[[Space[nn.Module], str | Budget], Space[nn.Module]]
BASE = Cost(params=1000, macs=2000, size=4000, peak_memory=100, latency=70)


def test_what_a_budget_leaves_out_is_bounded_by_the_base() -> None:
    budget = parse_budget("params=30%", BASE).no_worse_than(BASE, ("params", "macs", "latency"))
    assert dict(budget) == {"params": 300, "macs": 2000, "latency": 70}
    assert budget.fixed == ("macs", "latency")
    assert dict(budget.scaled(0.5)) == {"params": 150, "macs": 2000, "latency": 70}
    assert budget.scaled(0.5).fixed == budget.fixed
    assert budget.admits(BASE) is False
    assert budget.admits(Cost(params=300, macs=2000, latency=70))


def test_bounds_of_what_is_fixed_are_spread_over_factors_or_ask_for_nothing() -> None:
    box = Box(
        kinds=("params", "latency"),
        least=np.array([10.0, 1.0]),
        most=np.array([100.0, 64.0]),
        levels=(0.5, 1.0),
        fixed=("latency",),
    )
    params, latency = box.bounds(1000).T
    assert (latency == 64).mean() == pytest.approx(0.5, abs=0.01)
    asked = np.log2(latency[latency < 64])
    counts = [((asked >= low) & (asked < high)).sum() for low, high in pairwise(range(7))]
    assert min(counts) > 0.9 * max(counts)
    assert (params <= 50).mean() == pytest.approx(0.5, abs=0.01)
    assert box.level(0.5).tolist() == [50, 64]


def test_the_most_useful_come_first() -> None:
    goals = Goals(bounds=np.array([[1.0], [2.0], [3.0], [4.0]]), best=np.zeros(4))
    scores, costs = np.array([0.9, 0.5, 0.89, 0.1]), np.array([[4.0], [1.0], [3.0], [4.0]])
    order = list(most_useful(goals, scores, costs))
    assert [number for number, _ in order] == [1, 2, 0, 3]  # 0.5 at four bounds, 0.39 more at two, 0.01 at one
    assert [gain > 0 for _, gain in order] == [True, True, True, False]
    assert [number for number, _ in most_useful(goals, scores, costs, [3])][:2] == [3, 1]


def test_a_front_holds_the_best_and_what_is_cheap_in_its_own_way(resnet: Space[nn.Module], within: Within) -> None:
    base = resnet.table.base()
    space = within(resnet, parse_budget("params=2M", base).no_worse_than(base, ("macs", "peak_memory")))
    study = optuna.create_study(directions=["maximize", *["minimize"] * 3])

    def objective(trial: optuna.Trial) -> tuple[float, ...]:
        cost = space.admit(trial, space.suggest_genotype(trial))
        return cost.macs / base.macs, cost.params, cost.macs, cost.peak_memory  # type: ignore[return-value]

    space.enqueue(study, 8)
    study.optimize(objective, n_trials=8)
    costs = [space.cost(genotype) for genotype in choose_front(study, 5, space.budget)]
    macs = [trial.user_attrs["macs"] for trial in study.get_trials(deepcopy=False)]
    assert len(costs) == 5
    assert costs[0].macs == max(macs)
    assert min(cost.macs for cost in costs) < 0.3 * max(macs)  # and not five of the best


def test_what_refuses_a_budget_says_what_would_reach_it() -> None:
    base = timm.create_model("resnet18", num_classes=10).eval()
    options = parse_options("width")
    with pytest.raises(BudgetError) as refused:
        Space(base, img_size=32, options=options, name="resnet18", budget="peak_memory=50%,params=5%")
    text = str(refused.value)
    assert "no student of resnet18 is within" in text
    assert "with --search-stages peak_memory=" in text
    assert "with width in --space" not in text  # which is open
    assert "with all of these peak_memory=" in text
