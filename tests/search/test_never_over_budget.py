"""The budget is hard: over random spaces and budgets, through the solver, the sampler and the whole objective."""

from __future__ import annotations

from collections.abc import Callable

import optuna
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nas_kd.budget import Budget
from nas_kd.errors import BudgetError
from nas_kd.genotype import Genotype
from nas_kd.networks.convolutions import Shift2d
from nas_kd.search.options import parse_options
from nas_kd.search.sampler import make_sampler
from nas_kd.search.solver import solve
from nas_kd.search.space import Space
from nas_kd.search.trials import DIRECTIONS, Objective, Proxy, is_trained
from nas_kd.search.work import run_trials

MakeProxy = Callable[..., Proxy]
SPACES = {
    (spaces, stages): parse_options(spaces, search_stages=stages)
    for spaces in ("width", "kernel,conv", "width=1/0.5,conv=standard/shift,keep", "width,kernel,conv,keep")
    for stages in (False, True)
}
shares = st.floats(0.02, 1.1)
random_spaces = st.sampled_from(sorted(SPACES))
random_budgets = st.dictionaries(
    st.sampled_from(["params", "macs", "size", "peak_memory"]), shares, min_size=1, max_size=3
)


def random_space(
    base: nn.Module, opened: tuple[str, bool], budget: dict[str, float], levels: tuple[float, ...]
) -> Space[nn.Module]:
    """The space, or no example where nothing is within its budget; spread over levels where the smallest has one."""
    space = Space(base, img_size=16, options=SPACES[opened])
    whole = space.table.base()
    try:
        space = space.with_budget(Budget(tuple((kind, share * whole[kind]) for kind, share in sorted(budget.items()))))
    except BudgetError:
        assume(False)
    try:
        return space.with_levels(levels)
    except BudgetError:
        return space


def admitted(space: Space[nn.Module], genotype: Genotype) -> bool:
    """Whether a student is within the budget: by the table, and what is, as torch counts it when it is built."""
    assert space.budget is not None
    if not space.budget.admits(space.cost(genotype)):
        with pytest.raises(BudgetError, match="over budget"):
            space.student(genotype)
        return False
    student = space.student(genotype).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(torch.zeros(1, 1, 16, 16))
    flops, name = counter.get_flop_counts(), type(student).__name__
    shifts = [path for path, module in student.named_modules() if isinstance(module, Shift2d)]
    macs = (counter.get_total_flops() - sum(sum(flops[f"{name}.{path}"].values()) for path in shifts)) // 2
    counted = {"params": sum(p.numel() for p in student.parameters()), "macs": macs}
    assert all(counted[kind] <= bound for kind, bound in space.budget.items() if kind in counted)
    return True


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(
    opened=random_spaces,
    budget=random_budgets,
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([(1.0,), (0.5, 1.0)]),
)
def test_solutions_and_proposals(
    small: Space[nn.Module], opened: tuple[str, bool], budget: dict[str, float], seed: int, levels: tuple[float, ...]
) -> None:
    space = random_space(small.base, opened, budget, levels)
    assert space.budget is not None
    solution = solve(space.table, space.budget)
    assert solution is not None
    assert admitted(space, solution)
    study = optuna.create_study(directions=list(DIRECTIONS), sampler=make_sampler("knapsack", space, seed))
    for score in torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist():
        trial = study.ask()
        genotype = space.suggest_genotype(trial)
        cost = space.admit(trial, genotype)  # raises TrialPruned when it is over
        assert admitted(space, genotype)
        assert max(trial.constraints.values()) <= 0
        study.tell(trial, (score, cost.params, cost.macs))


@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(
    opened=random_spaces,
    budget=st.fixed_dictionaries({"params": st.floats(0.1, 0.9), "macs": st.floats(0.1, 0.9)}),
    seed=st.integers(0, 2**31),
    sampler=st.sampled_from(["knapsack", "random", "tpe", "nsgaii"]),
)
def test_the_whole_objective(
    small: Space[nn.Module],
    make_proxy: MakeProxy,
    opened: tuple[str, bool],
    budget: dict[str, float],
    seed: int,
    sampler: str,
) -> None:
    """Whoever proposes: nothing over the budget is trained, and what is pruned for it is over."""
    space = random_space(small.base, opened, budget, (1.0,))
    study = optuna.create_study(directions=list(DIRECTIONS), sampler=make_sampler(sampler, space, seed))
    run_trials(study, Objective(space, make_proxy()), trained=2, cap=3)
    assert study.get_trials()
    for trial in study.get_trials():
        genotype = Genotype.from_json(trial.user_attrs["genotype"])
        assert admitted(space, genotype) is (trial.state == TrialState.COMPLETE)
        assert trial.state == TrialState.COMPLETE or not is_trained(trial)
    if sampler == "knapsack":
        assert all(trial.state == TrialState.COMPLETE for trial in study.get_trials())
