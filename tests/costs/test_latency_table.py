"""Latency as a sum of blocks, with a measurement that is counted instead of timed."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import timm
import torch

import nas_kd.models  # noqa: F401  # registers cifar_resnet20
from nas_kd.analysis.structure import Analysis
from nas_kd.budget import LATENCY
from nas_kd.costs.cost_table import CostTable, cost_table
from nas_kd.costs.latency import Timing
from nas_kd.costs.latency_table import WHOLE, LatencyTable, Meter, store_key, structure_of
from nas_kd.costs.runtimes import LatencySpec, Subject
from nas_kd.costs.verification import analyse
from nas_kd.genotype import Genotype
from nas_kd.search.options import parse_options, restrict

SIZE = (3, 32, 32)


class Counted:
    """A machine on which a millisecond is a thousand parameters, whole models take `slope` times as long, and
    everything `speed` times."""

    def __init__(self, slope: float = 1.0, speed: float = 1.0) -> None:
        self.slope, self.speed, self.calls = slope, speed, 0

    def __call__(self, subjects: Mapping[str, Subject], timing: Timing) -> dict[str, float]:
        self.calls += 1
        factor = self.speed * (self.slope if timing == WHOLE else 1.0)
        return {
            name: factor * sum(p.numel() for p in subject.module.parameters()) / 1000
            for name, subject in subjects.items()
        }


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return timm.create_model("cifar_resnet20")


@pytest.fixture(scope="module")
def analysis(base: torch.nn.Module) -> Analysis:
    """Few enough choices of each kind to build every one of them in each test."""
    options = parse_options("width=1/0.5,kernel,conv=standard/depthwise/shift")
    return restrict(analyse(base, SIZE), options)


def measured(base: torch.nn.Module, analysis: Analysis, meter: Meter) -> LatencyTable:
    table = LatencyTable(base, analysis, SIZE, meter)
    table.measure_blocks()
    return table


def drawn(analysis: Analysis, seed: int) -> Genotype:
    generator = random.Random(seed)
    return Genotype.of({block.name: generator.choice(block.choices) for block in analysis.blocks})


@pytest.fixture(scope="module")
def exact(base: torch.nn.Module, analysis: Analysis) -> LatencyTable:
    return measured(base, analysis, Meter(LatencySpec(), measure=Counted()))


@pytest.fixture(scope="module")
def costs(base: torch.nn.Module, analysis: Analysis) -> CostTable:
    return cost_table(analysis, base)


def test_what_adds_up_is_the_sum_of_its_blocks(exact: LatencyTable, analysis: Analysis, costs: CostTable) -> None:
    table = exact.onto(costs)
    for seed in range(5):
        genotype = drawn(analysis, seed)
        assert exact.sum_of(genotype) == pytest.approx(1000 * costs.cost(genotype).params, abs=20)
        assert table.cost(genotype).latency == pytest.approx(1000 * costs.cost(genotype).params, abs=20)
    assert table.base().latency == 1000 * table.base().params


def test_costs_without_latency_tell_none(costs: CostTable) -> None:
    assert LATENCY not in costs.kinds
    assert costs.base().latency == 0


def test_each_structure_is_measured_once(base: torch.nn.Module, analysis: Analysis) -> None:
    store: dict[str, dict[str, int]] = {}
    first = Meter(LatencySpec(), store=store, measure=Counted())
    one = measured(base, analysis, first)
    assert first.measured < sum(len(block.choices) for block in analysis.blocks)  # equal blocks are one
    second = Meter(LatencySpec(), store=store, measure=Counted(speed=7.0))
    other = measured(base, analysis, second)
    assert second.measured == 0
    assert all((a == b).all() for a, b in zip(one.parts, other.parts, strict=True))
    assert one.whole(drawn(analysis, 1)) > 0
    assert other.whole(drawn(analysis, 1)) == one.whole(drawn(analysis, 1))


def test_a_slower_hour_changes_nothing(base: torch.nn.Module, analysis: Analysis) -> None:
    machine = Counted()
    table = measured(base, analysis, Meter(LatencySpec(), measure=machine))
    quick = table.whole(drawn(analysis, 1))
    machine.speed = 3.0
    assert quick == pytest.approx(LatencyTable.sum_of(table, drawn(analysis, 1)), abs=20)
    genotype = drawn(analysis, 2)
    assert table.whole(genotype) == pytest.approx(table.sum_of(genotype), abs=20)


def test_whole_models_correct_the_sums(base: torch.nn.Module, analysis: Analysis, costs: CostTable) -> None:
    """Half of what blocks save by themselves is lost in the whole network."""
    table = measured(base, analysis, Meter(LatencySpec(), measure=Counted()))
    base_ns = table.whole_base
    before = abs(table.onto(costs).cost(drawn(analysis, 9)).latency - (base_ns + table.sum_of(drawn(analysis, 9))) / 2)
    for seed in range(6):
        genotype = drawn(analysis, seed)
        table.observe(genotype, (base_ns + table.sum_of(genotype)) // 2)
    offset, slope = table.correction()
    after = abs(table.onto(costs).cost(drawn(analysis, 9)).latency - (base_ns + table.sum_of(drawn(analysis, 9))) / 2)
    assert offset == pytest.approx(0, abs=0.02)
    assert slope == pytest.approx(0.5, abs=0.02)
    assert after < before / 10


def test_no_model_no_correction(base: torch.nn.Module, analysis: Analysis) -> None:
    table = measured(base, analysis, Meter(LatencySpec(), measure=Counted()))
    assert table.correction() == pytest.approx((0, 1))


def test_the_cheapest_is_the_sum_of_the_fastest_choices(exact: LatencyTable, costs: CostTable) -> None:
    table = exact.onto(costs)
    fastest = table.cheapest(LATENCY)
    assert table.cost(fastest).latency == min(
        table.constants[LATENCY] + sum(int(part.min()) for part in table.single[LATENCY]), table.base().latency
    )


def test_no_sum_is_below_a_nanosecond(costs: CostTable) -> None:
    table = costs.with_latency(5, [vector * 0 - 9 for vector in costs.single["params"]])
    assert table.base().latency == 1


def test_structures_are_told_apart(base: torch.nn.Module) -> None:
    def digest(module: torch.nn.Module, size: int = 8, channels: int = 3) -> str:
        return structure_of(Subject(module=module, arguments=(torch.zeros(1, channels, size, size),)))

    conv = torch.nn.Conv2d(3, 4, 3)
    different = [digest(conv), digest(conv, size=9), digest(torch.nn.Conv2d(3, 4, 3, stride=2))]
    different += [digest(torch.nn.Conv2d(3, 4, 3, padding=1)), digest(torch.nn.Conv2d(3, 8, 3)), digest(base, 32)]
    assert len(set(different)) == len(different)
    assert digest(conv) == digest(torch.nn.Conv2d(3, 4, 3))


def test_files_are_of_a_specification() -> None:
    assert store_key(LatencySpec()) == store_key(LatencySpec())
    assert store_key(LatencySpec()) != store_key(LatencySpec(batch=8))
    assert store_key(LatencySpec()) != store_key(LatencySpec(command="mine"))


def test_the_base_keeps_its_mode(base: torch.nn.Module, analysis: Analysis) -> None:
    base.train()
    measured(base, analysis, Meter(LatencySpec(), measure=Counted()))
    assert base.training
    assert all(module.training for module in base.modules())
