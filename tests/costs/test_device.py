"""Flash and ram in closed form: as the built student has them, and as the search keeps to them."""

from __future__ import annotations

import importlib.util
from functools import cache

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, FEW, Base, base
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nas_kd.budget import Budget, Cost, parse_budget
from nas_kd.costs.cost_terms import Counts
from nas_kd.costs.device import DeviceTable, device_cost, device_table, planned
from nas_kd.errors import BudgetError, ModelError, NasKdError
from nas_kd.networks.tflite_file import need_tools
from nas_kd.search.solver import solve
from nas_kd.search.space import Space
from nas_kd.students.building import build_student

SEEDS = st.integers(0, 2**32 - 1)
OPEN = ("width", "kernel", "conv", "stages", "keep")


@cache
def tables(name: str) -> tuple[Base, DeviceTable]:
    subject = base(name, FAMILIES.get(name, 32), opened=OPEN)
    return subject, device_table(subject.analysis, Counts(subject.analysis))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tf_efficientnet_lite0", "regnety_004", "ghostnet_100")]


# a sum of slices; blocks that may be dropped; branches that are put together; gates
@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenetv2_100", "dla34", "mobilenetv3_small_100", *SLOW])
@FEW
@given(seed=SEEDS)
def test_the_table_tells_what_a_built_student_has(name: str, seed: int) -> None:
    subject, table = tables(name)
    genotype = subject.genotype(seed)
    truth = device_cost(build_student(subject.network, subject.analysis, genotype), subject.input_size)
    row = subject.table.indices(genotype)[None]
    assert (int(table.flash.at(row)[0]), int(table.ram(row)[0])) == (truth.flash, truth.ram)


def lives(seed: int, networks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 12, size=(networks, 9))
    return rng.integers(0, 200, size=first.shape), first, first + rng.integers(0, 5, size=first.shape)


@given(seed=SEEDS)
def test_a_plan_has_room_for_all_that_is_alive_and_each_network_its_own(seed: int) -> None:
    sizes, first, last = lives(seed, 4)
    heads = planned(sizes, first, last)
    rounded = -(-sizes // 16) * 16
    for row, head in enumerate(heads):
        alive = [rounded[row][(first[row] <= step) & (step <= last[row])].sum() for step in range(17)]
        assert max(alive) <= head <= rounded[row].sum()
        one = slice(row, row + 1)
        assert planned(sizes[one], first[one], last[one])[0] == head


def test_a_planner_that_leaves_a_gap() -> None:
    """As TensorFlow Lite Micro places the first stage of a ResNet-20: what it pads is the largest, and goes first."""
    sizes, first, last = np.array([[16_384, 16_384, 16_384, 18_496, 8_192]]), [[0, 1, 2, 3, 4]], [[3, 2, 3, 4, 5]]
    assert planned(sizes, np.array(first), np.array(last))[0] == 18_496 + 2 * 16_384


class _InPlace(nn.Module):
    """A sum and its bound, each written over its input; a slice of every second pixel, rows before columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += x
        return F.relu(self.last(F.relu_(y))) + y[:, :, ::2, ::2]


def test_operators_in_place_make_tensors_of_their_own_on_a_device() -> None:
    """The planner puts the padded copy first, the sum that it is made of above it, and what that is made of above that
    and below."""
    pixels, padded = 4 * 16 * 16, 4 * 18 * 18
    cost = device_cost(_InPlace(), (4, 16, 16))
    tail = 768 + 2 * (244 + 8 * 4) + 2 * 160 + 176 + 160
    assert cost.ram == padded + 2 * pixels + -(-tail // 16) * 16
    assert cost.flash == 640 + 2 * (4 * 4 * 9 + 16 * 4 + 268) + 2 * 124 + 200 + 142


def test_operators_that_devices_do_not_get_are_named() -> None:
    convnext = base("convnext_atto", 32)
    with pytest.raises(ModelError, match=r"(PERMUTE|update torch).* bound size and peak_memory instead"):
        device_table(convnext.analysis, Counts(convnext.analysis))


@pytest.fixture(scope="module")
def space() -> Space[nn.Module]:
    torch.manual_seed(0)
    return Space(timm.create_model("test_resnet", num_classes=10), img_size=32, name="test_resnet", budget="flash=100%")


def test_percentages_are_of_the_base(space: Space[nn.Module]) -> None:
    base_cost = space.base_cost()
    truth = device_cost(space.base, space.input_size)
    assert (base_cost.flash, base_cost.ram) == (truth.flash, truth.ram)
    assert space.with_budget("ram=90%,flash=50%").budget == Budget(
        (("ram", 0.9 * truth.ram), ("flash", 0.5 * truth.flash))
    )


def test_starts_keep_to_both(space: Space[nn.Module]) -> None:
    space = space.with_budget("ram=90%,flash=50%")
    starts = space.starts(4)
    assert starts
    assert space.budget is not None
    for genotype in starts:
        assert space.budget.admits(space.cost(genotype))
        built = device_cost(space.student(genotype), space.input_size)
        assert space.budget["ram"] >= built.ram
        assert space.budget["flash"] >= built.flash


def test_what_no_student_reaches_is_refused_with_the_smallest(space: Space[nn.Module]) -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(len(block.choices), size=500) for block in space.blocks], axis=1)
    least = space.table.cost(space.table.cheapest("ram")).ram
    assert least <= space.table.many(rows, ["ram"])["ram"].min()
    assert solve(space.table, Budget((("ram", float(least)),))) is not None
    with pytest.raises(BudgetError, match=r"within ram=2K: the smallest reachable is ram="):
        space.with_budget("ram=2KB")


def test_a_cost_that_was_not_counted_is_not_admitted() -> None:
    budget = parse_budget("ram=1K,flash=1K")
    assert not budget.admits(Cost(params=1, macs=1))
    assert budget.admits(Cost(params=1, macs=1, flash=1000, ram=1000))
    assert not budget.admits(Cost(params=1, macs=1, flash=1000, ram=1001))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ethosu" else find(name))
    with pytest.raises(NasKdError, match=r"need ethos-u-vela: pip install 'nas-kd\[mcu\]'"):
        need_tools("ethosu")
