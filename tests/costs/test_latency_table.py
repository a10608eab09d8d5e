"""Latency as a sum of blocks, with a measurement that is counted instead of timed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import timm
import torch

import nas_kd.models  # noqa: F401  # registers cifar_resnet20
from nas_kd.analysis.structure import Analysis
from nas_kd.budget import LATENCY
from nas_kd.costs.cost_table import CostTable, cost_table
from nas_kd.costs.latency import Timing
from nas_kd.costs.latency_table import STUDENTS, LatencyTable, Meter, latencies_key, structure_of
from nas_kd.costs.runtimes import LatencySpec, Measured, Subject
from nas_kd.costs.verification import analyse
from nas_kd.genotype import Genotype
from nas_kd.search.options import parse_options, restrict
from nas_kd.students.building import build_student

SIZE = (3, 32, 32)


class Counted:
    """A machine on which a millisecond is a thousand parameters and everything takes `speed` times as long; it tells
    of layers, or not."""

    def __init__(self, speed: float = 1.0, *, layers: bool = True) -> None:
        self.speed, self.layers = speed, layers

    def __call__(self, subjects: Mapping[str, Subject], timing: Timing) -> dict[str, Measured]:
        return {
            name: Measured(
                milliseconds=self.time(subject.module),
                layers={path: self.time(subject.module.get_submodule(path)) for path in subject.layers}
                if self.layers
                else {},
            )
            for name, subject in subjects.items()
        }

    def time(self, module: torch.nn.Module) -> float:
        return self.speed * sum(p.numel() for p in module.parameters()) / 1000


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
    table.measure_students()
    return table


def drawn(analysis: Analysis, seed: int) -> Genotype:
    generator = random.Random(seed)
    return Genotype.of({block.name: generator.choice(block.choices) for block in analysis.blocks})


@pytest.fixture(scope="module")
def costs(base: torch.nn.Module, analysis: Analysis) -> CostTable:
    return cost_table(analysis, base)


@pytest.mark.parametrize(("layers", "error"), [(True, 0.06), (False, 0.25)])
def test_what_layers_take_adds_up(
    base: torch.nn.Module, analysis: Analysis, costs: CostTable, layers: bool, error: float
) -> None:
    """Told of layers or of wholes alone, the table knows what other students take."""
    table = measured(base, analysis, Meter(LatencySpec(), measure=Counted(layers=layers))).onto(costs)
    assert table.base().latency == pytest.approx(1000 * table.base().params, rel=0.02)
    for seed in range(5):
        genotype = drawn(analysis, seed)
        assert table.cost(genotype).latency == pytest.approx(1000 * costs.cost(genotype).params, rel=error)


def test_costs_without_latency_tell_none(costs: CostTable) -> None:
    assert LATENCY not in costs.kinds
    assert costs.base().latency == 0


def test_each_structure_is_measured_once(base: torch.nn.Module, analysis: Analysis, costs: CostTable) -> None:
    store: dict[str, dict[str, Any]] = {}
    first = Meter(LatencySpec(), store=store, measure=Counted())
    one = measured(base, analysis, first)
    assert first.measured == 1 + STUDENTS  # the base's whole time, and its layers among the students'
    second = Meter(LatencySpec(), store=store, measure=Counted(speed=7.0))
    other = measured(base, analysis, second)
    assert second.measured == 0
    assert one.onto(costs).cost(drawn(analysis, 3)) == other.onto(costs).cost(drawn(analysis, 3))
    assert one.onto(costs).cost(drawn(analysis, 3)).latency == other.onto(costs).cost(drawn(analysis, 3)).latency
    assert one.whole(drawn(analysis, 1)) == other.whole(drawn(analysis, 1)) > 0
    assert other.other(build_student(base, analysis, drawn(analysis, 1))) == other.whole(drawn(analysis, 1))
    assert second.measured == 0


def test_who_was_timed_with_its_layers_is_not_timed_again(base: torch.nn.Module, analysis: Analysis) -> None:
    meter = Meter(LatencySpec(), measure=Counted())
    table = LatencyTable(base, analysis, SIZE, meter)
    whole = table.wholes([drawn(analysis, 1)], layers=True)
    measured = meter.measured
    assert [table.other(build_student(base, analysis, drawn(analysis, 1)))] == whole
    assert meter.measured == measured


def test_a_slower_hour_changes_nothing(base: torch.nn.Module, analysis: Analysis, costs: CostTable) -> None:
    machine = Counted()
    table = LatencyTable(base, analysis, SIZE, Meter(LatencySpec(), measure=machine))
    quick = table.whole(drawn(analysis, 1))
    machine.speed = 3.0
    slow = table.whole(drawn(analysis, 2))
    assert quick == pytest.approx(1000 * costs.cost(drawn(analysis, 1)).params, abs=20)
    assert slow == pytest.approx(1000 * costs.cost(drawn(analysis, 2)).params, abs=20)


def test_whole_students_correct_the_sums(base: torch.nn.Module, analysis: Analysis, costs: CostTable) -> None:
    """Whole students turn out to take three tenths more than their layers."""
    table = measured(base, analysis, Meter(LatencySpec(), measure=Counted()))
    genotypes = [drawn(analysis, seed) for seed in range(20)]
    for genotype in genotypes[:12]:
        table.observe(genotype, round(1.3 * 1000 * costs.cost(genotype).params))
    before = [costs.cost(genotype).params * 1000 for genotype in genotypes[12:]]
    after = [table.onto(costs).cost(genotype).latency for genotype in genotypes[12:]]
    ratios = [late / early for early, late in zip(before, after, strict=True)]
    assert 1.05 < sum(ratios) / len(ratios) < 1.3


def test_the_cheapest_is_no_slower_than_random_ones(
    base: torch.nn.Module, analysis: Analysis, costs: CostTable
) -> None:
    table = measured(base, analysis, Meter(LatencySpec(), measure=Counted())).onto(costs)
    fastest = table.cost(table.cheapest(LATENCY)).latency
    assert all(fastest <= table.cost(drawn(analysis, seed)).latency for seed in range(20))


def test_no_sum_is_below_a_nanosecond(costs: CostTable) -> None:
    table = costs.with_measured(
        LATENCY, {(): np.array(5.0), **{(n,): v * 0.0 - 9 for n, v in enumerate(costs.single["params"])}}
    )
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
    assert latencies_key(LatencySpec()) == latencies_key(LatencySpec())
    assert latencies_key(LatencySpec()) != latencies_key(LatencySpec(batch=8))
    assert latencies_key(LatencySpec()) != latencies_key(LatencySpec(command="mine"))


def test_the_base_keeps_its_mode(base: torch.nn.Module, analysis: Analysis) -> None:
    base.train()
    measured(base, analysis, Meter(LatencySpec(), measure=Counted()))
    assert base.training
    assert all(module.training for module in base.modules())
