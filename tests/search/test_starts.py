from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nas_kd.budget import Budget
from nas_kd.search.solver import solve
from nas_kd.search.space import Space
from nas_kd.search.starts import (
    feasible_starts,
    knapsack_starts,
    mixed_starts,
    prior_damages,
    random_genotype,
    tightness,
    uniform_genotype,
    uniform_ladder,
    uniform_width_student,
)

Within = Callable[[Space[nn.Module], str], Space[nn.Module]]


def limits(space: Space[nn.Module], params: float, macs: float) -> Budget:
    base = space.table.base()
    return Budget((("params", params * base.params), ("macs", macs * base.macs)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(params=st.floats(0.01, 1.2), macs=st.floats(0.01, 1.2), count=st.integers(1, 12))
def test_starts_are_within_any_budget_and_go_from_cheap_to_dear(
    space: Space[nn.Module], params: float, macs: float, count: int
) -> None:
    budget = limits(space, params, macs)
    starts = feasible_starts(space.table, budget, count)
    costs = [space.cost(genotype) for genotype in starts]
    assert all(budget.admits(cost) for cost in costs)
    assert len(starts) == len(set(starts)) <= count
    shares = [tightness(cost, budget, space.table.base()) for cost in costs]
    assert shares == sorted(shares)


def test_knapsack_starts_hold_the_solution_within_each_level_and_spread_over_both_costs(
    resnet: Space[nn.Module],
) -> None:
    table, damages = resnet.table, prior_damages(resnet.table)
    budget = limits(resnet, 0.2, 0.3)
    starts = knapsack_starts(table, budget, damages, 8, (0.5, 1.0))
    costs = [table.cost(start) for start in starts]
    assert len(set(starts)) == 8
    assert all(budget.admits(cost) for cost in costs)
    for level in (0.5, 1.0):
        assert solve(table, budget.scaled(level), damages) in starts
    ratios = [cost.params / cost.macs for cost in costs]
    assert max(ratios) > 1.5 * min(ratios)  # they do not all lie where every bound is lowered by one share


def test_few_knapsack_starts_are_those_of_the_levels(resnet: Space[nn.Module]) -> None:
    table, damages = resnet.table, prior_damages(resnet.table)
    budget = limits(resnet, 0.2, 0.3)
    assert mixed_starts(table, budget, 1, damages) == [solve(table, budget, damages)]
    assert len(knapsack_starts(table, budget, damages, 1, (0.5, 0.75, 1.0))) == 3


def test_no_knapsack_start_is_within_what_cannot_be_met(resnet: Space[nn.Module]) -> None:
    assert knapsack_starts(resnet.table, Budget((("params", 1.0),)), prior_damages(resnet.table), 8) == []


def test_the_default_budget_of_resnet18_has_many_starts_up_to_its_bound(resnet: Space[nn.Module]) -> None:
    budget = Budget((("params", 1e6),))
    starts = feasible_starts(resnet.table, budget, 8)
    assert len(starts) == 8
    assert resnet.cost(starts[0]) == resnet.cost(resnet.table.cheapest("params"))
    assert resnet.cost(starts[-1]).params > 0.5e6


def test_without_a_budget_the_ladder_goes_up_to_the_base(space: Space[nn.Module]) -> None:
    starts = feasible_starts(space.table, None, 100)
    assert space.analysis.identity in starts
    assert len(starts) == len(uniform_ladder(space.table))


def test_a_uniform_genotype_takes_what_each_block_offers(space: Space[nn.Module]) -> None:
    genotype = uniform_genotype(space.blocks, 0.5, "depthwise")
    space.analysis.check(genotype)
    for block in space.blocks:
        assert genotype[block.name].width == (0.5 if 0.5 in block.widths else genotype[block.name].width)
        assert genotype[block.name].conv == ("depthwise" if "depthwise" in block.convs else block.default.conv)


def test_the_uniform_student_is_the_widest_of_the_bases_own_convolutions(space: Space[nn.Module]) -> None:
    base = space.table.base()
    student = uniform_width_student(space.table, limits(space, 0.6, 1.0))
    assert student is not None
    assert space.cost(student).params <= 0.6 * base.params
    assert [student[b.name].conv for b in space.blocks] == [b.default.conv for b in space.blocks]
    assert uniform_width_student(space.table, limits(space, 1.0, 1.0)) == space.analysis.identity
    assert uniform_width_student(space.table, Budget((("params", 1.0),))) is None


def test_a_random_genotype_is_within_the_budget_and_fixed_by_its_seed(resnet: Space[nn.Module]) -> None:
    budget = Budget((("params", 1e6),))
    drawn = [random_genotype(resnet.table, budget, seed, draws=5_000) for seed in (1, 1, 2)]
    assert drawn[0] is not None
    assert drawn[2] is not None
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(budget.admits(resnet.cost(genotype)) for genotype in drawn if genotype is not None)


def test_no_random_genotype_is_no_genotype(resnet: Space[nn.Module]) -> None:
    assert random_genotype(resnet.table, Budget((("params", 1.0),)), seed=0, draws=100) is None


@pytest.mark.parametrize("count", [1, 2])
def test_few_starts_are_spread(resnet: Space[nn.Module], count: int) -> None:
    starts = feasible_starts(resnet.table, Budget((("params", 1e6),)), count)
    assert len(starts) == count
    assert starts[0] == resnet.table.cheapest("params")
