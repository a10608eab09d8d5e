from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, FEW, base, family
from hypothesis import given
from hypothesis import strategies as st
from runtime_memory import most_alive
from safetensors.torch import save_file
from torch import Tensor, nn

from nas_kd.analysis.schedule import Activations, bytes_of_weights
from nas_kd.budget import Budget
from nas_kd.costs.verification import measure
from nas_kd.genotype import Genotype
from nas_kd.networks.onnx import write_onnx
from nas_kd.results.export import export
from nas_kd.search.solver import solve
from nas_kd.students.building import build_student

SEEDS = st.integers(0, 2**32 - 1)
OPEN = ("width", "kernel", "conv", "stages", "keep")


# a shortcut past several blocks that may all be dropped; blocks without shortcut; a layer scale
@pytest.mark.parametrize("name", ["cspresnet50", "mobilenetv2_100", "convnext_atto", "dla34"])
@FEW
@given(seed=SEEDS)
def test_streams_and_dropped_blocks_are_exact_too(name: str, seed: int) -> None:
    subject = base(name, FAMILIES[name], opened=OPEN)
    genotype = subject.genotype(seed)
    truth = measure(build_student(subject.network, subject.analysis, genotype), subject.input_size)
    cost = subject.table.cost(genotype)
    assert (cost.size, cost.peak_memory) == (truth.size, truth.peak_memory)


def test_blocks_dropped_in_a_row_leave_what_the_first_of_them_reads() -> None:
    """It is alive as their stage's shortcut anyway, and so counts once, also where no width sets its channels."""
    subject = base("cspresnet50", 32, opened=("width", "keep"))
    kept = subject.analysis.identity
    dropped = {name: replace(kept[name], keep=False) for name in ("stages.0.blocks.0", "stages.0.blocks.1")}
    for stage in subject.analysis.block("stages.0").choices:
        genotype = Genotype.of({**kept, **dropped, "stages.0": stage})
        truth = measure(build_student(subject.network, subject.analysis, genotype), subject.input_size)
        assert subject.table.cost(genotype) == truth


class _Small(nn.Module):
    """Between 4×8×8 images and a 2×8×8 output: 8 channels twice, of which the sum takes no more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.first(x))
        inner = torch.sigmoid(self.norm(self.second(inner))).flatten(2).view(1, 8, 8, 8) + inner
        return self.last(F.pad(inner, [1, 1, 1, 1]))


class _Copies(nn.Module):
    """A norm that is behind no convolution, on the image, and a half of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)[:, 2:] * 2


def test_the_schedule() -> None:
    pixels, float_bytes = 64, 4
    assert measure(_Small(), (4, 8, 8)).peak_memory == (8 + 8) * pixels * float_bytes
    assert measure(_Copies(), (4, 8, 8)).peak_memory == (4 + 4) * pixels * float_bytes
    with_image = nn.Sequential(nn.ReLU(), _Copies())
    assert measure(with_image, (4, 8, 8)).peak_memory == (4 + 4) * pixels * float_bytes


# max pooling, shortcuts with an average, another order of branches, padding "same", cheap convolutions with strides
@pytest.mark.parametrize(
    ("name", "side", "seed"),
    [("resnet18", 64, None), ("cifar_resnet20", 32, 0), ("regnetx_002", 64, None), ("tf_efficientnet_lite0", 64, 1)],
)
def test_it_is_what_onnx_runtime_keeps_alive(name: str, side: int, seed: int | None, tmp_path: Path) -> None:
    subject = base(name, side)
    genotype = subject.analysis.identity if seed is None else subject.genotype(seed)
    student = build_student(timm.create_model(name, num_classes=10).eval(), subject.analysis, genotype)
    write_onnx(student, (torch.zeros(1, 3, side, side),), tmp_path / "student.onnx")
    assert most_alive(tmp_path / "student.onnx") == subject.table.cost(genotype).peak_memory


@pytest.mark.parametrize("kind", ["depthwise", "shift", "group4"])
@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenetv2_100"])
def test_cheap_convolutions_need_no_more_than_what_they_replace(name: str, kind: str) -> None:
    subject = base(name, 32)
    kinds = {b.name: next((c for c in b.choices if c.conv == kind), b.default) for b in subject.table.blocks}
    assert subject.table.cost(kinds).peak_memory <= subject.table.base().peak_memory


def test_what_nothing_reads_does_not_count() -> None:
    activations = Activations()
    image, kept, lost = (torch.empty(n, device="meta") for n in (10, 20, 1000))
    activations.begin(image)
    activations.record("", torch.ops.aten.max_pool2d_with_indices.default, [], [image], [kept, lost])
    activations.record("", torch.ops.aten.relu_.default, [], [kept], [kept])
    assert activations.peak([kept]) == 4 * (10 + 20)


def test_weights_count_as_float32_and_buffers_as_they_are() -> None:
    norm = nn.BatchNorm2d(6).half()
    assert bytes_of_weights(norm) == 4 * 6 * 4 + 8  # and the number of batches


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet18"])
def test_size_is_that_of_the_exported_tensors(name: str, tmp_path: Path) -> None:
    network = timm.create_model(name, num_classes=10)
    subject = family(name)
    student = build_student(network, subject.analysis, genotype := subject.genotype(1))
    folder = export(student, tmp_path / "small")
    weights = (folder / "model.safetensors").read_bytes()
    header = int.from_bytes(weights[:8], "little")
    assert len(weights) - 8 - header == subject.table.cost(genotype).size == bytes_of_weights(student)


def test_shifts_save_the_order_of_their_channels(tmp_path: Path) -> None:
    subject = base("cifar_resnet20", 32)
    shifted = {b.name: next(c for c in b.choices if c.conv == "shift") for b in subject.table.blocks}
    student = build_student(timm.create_model("cifar_resnet20"), subject.analysis, shifted)
    save_file(student.state_dict(), tmp_path / "weights")
    header = json.loads((tmp_path / "weights").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert max(entry["data_offsets"][1] for entry in header.values()) == subject.table.cost(shifted).size


@pytest.mark.parametrize("name", ["vgg11_bn", "mobilenetv2_100", "densenet121"])
def test_nothing_peaks_lower_than_the_cheapest(name: str) -> None:
    table = base(name, 32).table
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(len(block.choices), size=2000) for block in table.blocks], axis=1)
    least = table.cost(table.cheapest("peak_memory")).peak_memory
    assert least <= table.many(rows, ["peak_memory"])["peak_memory"].min()


@pytest.mark.parametrize("name", ["vgg11_bn", "mobilenetv2_100", "cifar_resnet20"])
def test_the_knapsack_keeps_a_bound_on_memory(name: str) -> None:
    table = base(name, 32).table
    least = table.cost(table.cheapest("peak_memory")).peak_memory
    most = table.base().peak_memory
    budget = Budget((("params", table.base().params), ("peak_memory", (least + most) / 2)))
    genotype = solve(table, budget, [np.array([1 - c.width for c in b.choices]) for b in table.blocks])
    assert genotype is not None
    assert budget.admits(table.cost(genotype))
    assert solve(table, Budget((("peak_memory", least),))) is not None
    assert solve(table, Budget((("peak_memory", least - 1),))) is None
