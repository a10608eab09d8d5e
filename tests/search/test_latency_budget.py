"""Budgets on latency, with a machine on which a whole network is slower than its blocks promise."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import optuna
import pytest
import timm
from torch import nn

import nas_kd.models  # noqa: F401  # registers cifar_resnet20
from nas_kd.budget import LATENCY
from nas_kd.costs.latency import Timing
from nas_kd.costs.latency_table import Meter
from nas_kd.costs.runtimes import LatencySpec, Measured, Subject
from nas_kd.errors import BudgetError
from nas_kd.search.options import parse_options
from nas_kd.search.sampler import KnapsackSampler
from nas_kd.search.space import Space


class Machine:
    """A millisecond is a thousand parameters; a whole network takes a launch for each of its modules as well."""

    def __init__(self) -> None:
        self.wholes = 0

    def __call__(self, subjects: Mapping[str, Subject], timing: Timing) -> dict[str, Measured]:
        self.wholes += len(subjects)
        return {name: Measured(milliseconds=self.milliseconds(subject.module)) for name, subject in subjects.items()}

    def milliseconds(self, module: nn.Module) -> float:
        params = sum(p.numel() for p in module.parameters())
        return params / 1000 + 1.0 * sum(1 for _ in module.modules())


def make_space(
    budget: str | None, store: dict[str, dict[str, int]] | None = None, machine: Machine | None = None
) -> Space[nn.Module]:
    meter = Meter(LatencySpec(), store=store, measure=machine or Machine())
    options = parse_options("width=0.25/0.5/1,conv=standard/depthwise")
    return Space(timm.create_model("cifar_resnet20"), img_size=32, options=options, budget=budget, meter=meter)


def truth(space: Space[nn.Module], student: nn.Module) -> float:
    return Machine().milliseconds(student) * 1e6


def objective_of(space: Space[nn.Module], built: list[float]) -> object:
    def objective(trial: optuna.Trial) -> float:
        student = space.suggest(trial)
        built.append(truth(space, student))
        return 0.5 + 1e-9 * trial.user_attrs["params"]

    return objective


@pytest.mark.parametrize(("budget", "seed"), [("latency=60%", 0), ("latency=150ms,macs=50%", 1)])
def test_nothing_slower_than_the_budget_is_ever_built(budget: str, seed: int) -> None:
    space = make_space(budget)
    assert space.budget is not None
    study = optuna.create_study(direction="maximize", sampler=KnapsackSampler(space, seed=seed))
    built: list[float] = []
    space.enqueue(study)
    study.optimize(objective_of(space, built), n_trials=16)  # type: ignore[arg-type]
    assert len(built) >= 8  # proposals come to be within the budget
    assert max(built) <= space.budget[LATENCY]
    for trial in study.get_trials(deepcopy=False):
        assert (trial.constraints[LATENCY] <= 0) == (trial.user_attrs[LATENCY] <= space.budget[LATENCY])
        if trial.state == optuna.trial.TrialState.PRUNED:
            assert max(trial.constraints.values()) > 0
            assert "over" in trial.user_attrs["reason"]


def test_starts_are_within_as_whole_models() -> None:
    space = make_space("latency=50%")
    assert space.budget is not None
    starts = space.starts()
    assert len(starts) >= 4
    assert all(truth(space, space.student(start)) <= space.budget[LATENCY] for start in starts)


class Jagged(Machine):
    """A machine on which each shape of weights is slower by something of its own, which no table foresees."""

    def milliseconds(self, module: nn.Module) -> float:
        slower = sum(p.numel() / 1000 * (zlib.crc32(f"0{tuple(p.shape)}".encode()) % 1000 / 1000) for p in _all(module))
        return super().milliseconds(module) + slower


def _all(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for one in module.modules() for parameter in one.parameters(recurse=False))


def test_what_is_slower_than_expected_is_solved_again_until_it_is_within() -> None:
    space = make_space("latency=50%", machine=Jagged())
    assert space.budget is not None
    (start,) = space.starts(1)
    bound = space.budget[LATENCY]
    assert 0.9 * bound < Jagged().milliseconds(space.student(start)) * 1e6 <= bound


def test_students_are_measured_together() -> None:
    space = make_space("latency=150ms,macs=50%")
    latency = space.costs.latency
    assert latency is not None
    students = {space.table.cheapest(kind) for kind in ("params", "macs", "peak_memory")}
    space.confirm(students)
    measured = latency.meter.measured
    assert all(latency.known(student) is not None for student in students)
    assert all(space.confirmed_cost(student) == space.cost(student) for student in students)
    assert latency.meter.measured == measured


def test_a_share_is_of_the_measured_base() -> None:
    space = make_space("latency=50%")
    assert space.budget is not None
    assert space.budget[LATENCY] == pytest.approx(0.5 * truth(space, space.base), rel=1e-6)
    assert space.base_cost().latency == pytest.approx(truth(space, space.base), rel=1e-6)


def test_an_impossible_latency_names_the_smallest_that_was_measured() -> None:
    with pytest.raises(BudgetError, match=r"within latency=1ms: the smallest reachable is latency=\d+\.?\d*ms; raise"):
        make_space("latency=1ms")


class Reversed(Machine):
    """A machine on which more parameters are faster."""

    def milliseconds(self, module: nn.Module) -> float:
        return 1000 - sum(p.numel() for p in module.parameters()) / 1000


def test_bounds_that_cannot_be_met_together() -> None:
    space = make_space(None, machine=Reversed())
    with pytest.raises(BudgetError, match=r"latency=7\d+\.?\d*ms, params=12.73K \(each alone; no student meets all"):
        space.with_budget("latency=800ms,params=20K")
    assert space.with_budget("latency=995ms,params=20K").budget is not None


def test_a_student_that_turns_out_slow_is_refused() -> None:
    space = make_space("latency=60%")
    with pytest.raises(BudgetError, match=r"over budget: latency .*ms is .* over .*ms"):
        space.student(space.analysis.identity)


def test_a_resumed_study_has_the_table_of_an_uninterrupted_one() -> None:
    store: dict[str, dict[str, int]] = {}
    space = make_space("latency=60%", store)
    study = optuna.create_study(direction="maximize", sampler=KnapsackSampler(space, seed=1))
    space.enqueue(study)
    study.optimize(objective_of(space, []), n_trials=10)  # type: ignore[arg-type]
    again = make_space("latency=60%", store)
    known = len(store)
    again.enqueue(study)
    assert len(store) == known  # nothing is measured twice
    assert len(study.get_trials(deepcopy=False)) == 10  # the same starts, which are there
    space.recall_latencies(study)
    single = zip(space.table.single[LATENCY], again.table.single[LATENCY], strict=True)
    assert all(np.abs(one - other).max() <= 1 for one, other in single)
    assert abs(space.table.constants[LATENCY] - again.table.constants[LATENCY]) <= 1


def test_without_a_bound_nothing_is_measured() -> None:
    space = Space(timm.create_model("cifar_resnet20"), img_size=32, budget="params=50%")
    assert space.costs.latency is None
    assert LATENCY not in space.table.kinds
