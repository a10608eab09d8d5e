from __future__ import annotations

import itertools

import numpy as np
import pytest
import timm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nas_kd.budget import KINDS, Budget, parse_budget
from nas_kd.costs import peak_memory as memory
from nas_kd.costs.cost_table import CostTable, cost_table
from nas_kd.costs.verification import analyse
from nas_kd.search import solver
from nas_kd.search.options import parse_options, restrict
from nas_kd.search.solver import solve
from nas_kd.search.space import Space


def table_of(name: str, side: int, space: str) -> CostTable:
    network = timm.create_model(name, num_classes=10)
    analysis = analyse(network, (3, side, side), name=name)
    return cost_table(restrict(analysis, parse_options(space)), network)


class _Bottleneck(nn.Module):
    """16 channels, 64 within, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(64, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.reduce(x).relu())


@pytest.fixture(scope="module")
def small() -> CostTable:
    """Blocks that feed each other, few enough to try every genotype."""
    table = table_of("vgg11_bn", 32, "width=1/0.5")
    assert table.pairs["params"]
    assert 64 <= np.prod([len(block.choices) for block in table.blocks]) <= 5000
    return table


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), params=st.floats(0.05, 1.1), macs=st.floats(0.05, 1.1))
def test_the_solution_is_the_best_of_all_genotypes_within_the_budget(
    small: CostTable, seed: int, params: float, macs: float
) -> None:
    base = small.base()
    budget = Budget((("params", params * base.params), ("macs", macs * base.macs)))
    generator = np.random.default_rng(seed)
    damages = [generator.random(len(block.choices)) for block in small.blocks]
    rows = np.array(list(itertools.product(*(range(len(block.choices)) for block in small.blocks))))
    totals = small.many(rows)
    within = np.all([totals[kind] <= bound for kind, bound in budget.items()], axis=0)
    damage = np.sum([d[column] for d, column in zip(damages, rows.T, strict=True)], axis=0)
    found = solve(small, budget, damages)
    if not within.any():
        assert found is None
        return
    assert found is not None
    assert budget.admits(small.cost(found))
    reached = sum(d[index] for d, index in zip(damages, small.indices(found), strict=True))
    assert reached == pytest.approx(damage[within].min(), abs=1e-3)


def test_what_another_choice_is_as_good_as_is_left_out(small: CostTable) -> None:
    problem = solver._Problem(small, ("params",), {})
    equal = [np.zeros(len(block.choices)) for block in small.blocks]
    narrowest = np.concatenate([np.arange(len(block.choices)) == block.narrowest for block in small.blocks])
    assert list(problem.useful(equal, {})[: problem.choices]) == list(narrowest)
    hurting = [-np.array(vector, dtype=float) for vector in small.single["macs"]]  # each dearer one is better
    assert sum(problem.useful(hurting, {})[: problem.choices]) > len(small.blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_reachable_cost_is_what_the_solver_can_reach_and_no_less(small: CostTable, kind: str) -> None:
    least = small.cost(small.cheapest(kind))[kind]
    at, below = Budget(((kind, float(least)),)), Budget(((kind, least - 1.0),))
    found = solve(small, at)
    assert found is not None
    assert small.cost(found)[kind] == least
    assert solve(small, below) is None


@pytest.mark.parametrize("dense", [1, memory._DENSE])
def test_dropped_blocks_count_exactly_however_memory_is_kept(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets at, and a byte below, everything that is reachable, against all genotypes."""
    monkeypatch.setattr(memory, "_DENSE", dense)  # 1: moments that depend on two blocks or more stay sums of products
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), _Bottleneck(), _Bottleneck(), _Bottleneck(), nn.Conv2d(16, 4, 1)
    )
    analysis = analyse(network, (3, 8, 8), open=("width", "stages", "keep"))
    table = cost_table(restrict(analysis, parse_options("width=1/0.5/0.125,keep", search_stages=True)), network)
    assert any(amount.products for _, amount in table.memory.sums) == (dense == 1)
    rows = np.array(list(itertools.product(*(range(len(block.choices)) for block in table.blocks))))
    totals = table.many(rows)
    peaks = np.unique(totals["peak_memory"])
    generator = np.random.default_rng(0)
    damages = [generator.random(len(block.choices)) for block in table.blocks]
    damage = np.sum([d[column] for d, column in zip(damages, rows.T, strict=True)], axis=0)
    for peak, params in itertools.product((*peaks, *(peaks - 1)), np.quantile(totals["params"], (0, 0.1, 0.5, 1))):
        budget = Budget((("peak_memory", float(peak)), ("params", float(params))))
        within = (totals["peak_memory"] <= peak) & (totals["params"] <= params)
        found = solve(table, budget, damages)
        assert (found is not None) == within.any()
        if found is not None:
            assert budget.admits(table.cost(found))
            reached = sum(d[index] for d, index in zip(damages, table.indices(found), strict=True))
            assert reached == pytest.approx(damage[within].min(), abs=1e-3)


def test_the_smallest_costs_can_be_met_together_where_only_widths_change() -> None:
    network: nn.Module = timm.create_model("vgg11_bn", num_classes=10)
    space = Space(network, img_size=32, options=parse_options("width"), name="vgg11_bn")
    table = space.table
    least = {kind: table.cost(table.cheapest(kind))[kind] for kind in KINDS}
    # widths alone: the cheapest in one kind is the cheapest in both
    space.with_budget(parse_budget(",".join(f"{kind}={cost}" for kind, cost in least.items())))
