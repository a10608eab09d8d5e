from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from families import CIFAR, COVERED, FAMILIES, FEW, OTHERS, base, family, kinds, narrowest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nas_kd.budget import KINDS, Cost
from nas_kd.costs.verification import measure
from nas_kd.genotype import Choice, Genotype
from nas_kd.students.building import build_student

GOLDEN = Path(__file__).parents[1] / "golden" / "costs.json"
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", FAMILIES)
@FEW
@given(seed=SEEDS)
def test_table_equals_built_student(name: str, seed: int) -> None:
    subject = family(name)
    genotype = subject.genotype(seed)
    student = build_student(subject.network, subject.analysis, genotype)
    assert kinds(measure(student, subject.input_size)) == kinds(subject.table.cost(genotype))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_others_are_exact_too(name: str) -> None:
    subject = base(name, timm.get_pretrained_cfg(name).input_size[-1])
    for seed in range(5):
        genotype = subject.genotype(seed)
        student = build_student(subject.network, subject.analysis, genotype)
        assert kinds(measure(student, subject.input_size)) == kinds(subject.table.cost(genotype))


def test_blurred_pooling_follows_its_width() -> None:
    subject = base("resnetblur50", 32)
    assert not any("stays" in reason for _, reason in subject.analysis.left_alone)
    narrow = Genotype.of({block.name: narrowest(block.choices) for block in subject.table.blocks})
    student = build_student(subject.network, subject.analysis, narrow)
    assert kinds(measure(student, subject.input_size)) == kinds(subject.table.cost(narrow))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto", "cspresnet50", "repvgg_a0"])
@FEW
@given(seed=SEEDS)
def test_streams_and_dropped_blocks_are_exact_too(name: str, seed: int) -> None:
    subject = base(name, FAMILIES[name], opened=("width", "kernel", "conv", "stages", "keep"))
    genotype = subject.genotype(seed)
    student = build_student(subject.network, subject.analysis, genotype)
    assert measure(student, subject.input_size) == subject.table.cost(genotype)
    assert any(block.name.endswith(".stream") for block in subject.analysis.blocks)


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_costs_what_the_base_costs(name: str) -> None:
    subject = family(name)
    assert kinds(subject.table.base()) == kinds(measure(subject.network, subject.input_size))


def test_measure_is_half_of_torchs_flop_count() -> None:
    subject = family("resnet18")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subject.network(torch.empty(1, *subject.input_size, device="meta"))
    cost = measure(subject.network, subject.input_size)
    assert cost.macs * 2 == counter.get_total_flops()
    assert cost.params == sum(parameter.numel() for parameter in subject.network.parameters())


def test_a_number_known_to_everyone() -> None:
    table = base("resnet18", 224, 1000).table
    assert table.base() == Cost(params=11_689_512, macs=1_814_073_344)


@FEW
@given(seed=SEEDS)
def test_many_equals_one_by_one(seed: int) -> None:
    table = family("vgg11_bn").table
    rng = np.random.default_rng(seed)
    rows = np.array([[rng.integers(len(block.choices)) for block in table.blocks] for _ in range(5)])
    totals = table.many(rows)
    for number, row in enumerate(rows):
        assert table.cost(table.genotype(row)) == Cost(**{kind: int(totals[kind][number]) for kind in KINDS})
        assert (table.indices(table.genotype(row)) == row).all()


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2_100", "inception_v3", "regnety_004"])
@FEW
@given(seed=SEEDS)
def test_cost_grows_with_every_width(name: str, seed: int) -> None:
    subject = family(name)
    genotype = dict(subject.genotype(seed))
    before = subject.table.cost(genotype)
    for block in subject.table.blocks:
        choice = genotype[block.name]
        wider = [c for c in block.choices if c.width > choice.width and _same_kind(c, choice)]
        for other in wider[:1]:
            after = subject.table.cost({**genotype, block.name: other})
            assert after.params > before.params
            assert after.macs > before.macs


def _same_kind(one: Choice, two: Choice) -> bool:
    return (one.kernel_size, one.conv) == (two.kernel_size, two.conv)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenetv3_small_100", "nfnet_l0"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cheaper_than_the_cheapest(name: str, kind: str) -> None:
    table = family(name).table
    smallest = table.cost(table.cheapest(kind))[kind]
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(len(block.choices), size=2000) for block in table.blocks], axis=1)
    assert smallest <= table.many(rows)[kind].min()


def test_golden_names_every_covered_model() -> None:
    assert sorted(json.loads(GOLDEN.read_text())) == sorted((*COVERED, *CIFAR))


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv2_100", "vgg11_bn", "convnext_atto", "repvgg_a0", "regnetx_002", *CIFAR]
)
def test_golden(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    table = base(name, golden["input_size"][-1], 10 if name in CIFAR else 1000).table
    for kind, cost in kinds(table.base()).items():
        assert (kind, cost) == (kind, golden[kind])
        assert table.cost(table.cheapest(kind))[kind] == golden[f"min_{kind}"]
