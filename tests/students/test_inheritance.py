from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import family, real
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

from nas_kd.genotype import Genotype
from nas_kd.networks.convolutions import ConvSpec, Shift2d, build_conv, tap_shares
from nas_kd.students.inheritance import (
    approximate,
    assign_taps,
    effective_weight,
    inherit_student,
    low_rank,
    resize_kernel,
    split_blueprint,
    split_grouped,
    unit_importance,
)

SIZES = st.integers(1, 7)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(rows=SIZES, columns=SIZES, rank=SIZES, seed=st.integers(0, 99))
def test_low_rank_is_the_best(rows: int, columns: int, rank: int, seed: int) -> None:
    """Eckart–Young: what is left over is the energy of the smaller singular values."""
    matrix = _randn(3, rows, columns, seed=seed)
    left, right = low_rank(matrix, rank)
    assert left.shape == (3, rows, rank)
    assert right.shape == (3, rank, columns)
    rest = torch.linalg.svdvals(matrix)[:, rank:].square().sum(-1)
    torch.testing.assert_close((matrix - left @ right).square().sum((1, 2)), rest, atol=1e-9, rtol=1e-6)


def test_low_rank_shares_the_norm_between_its_factors() -> None:
    left, right = low_rank(_randn(6, 9), 4)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


@pytest.mark.parametrize("matrix", [torch.zeros(4, 5), torch.ones(4, 5), torch.full((3, 3), 1e-20)])
def test_low_rank_of_degenerate_matrices(matrix: Tensor) -> None:
    left, right = low_rank(matrix, 2)
    assert left.isfinite().all()
    assert right.isfinite().all()
    torch.testing.assert_close(left @ right, matrix)


def _dense(first: Tensor, groups: int, second: Tensor) -> Tensor:
    """The O×I×k×k kernel of a grouped convolution (I × I/g × k × k) and a 1×1 (O×I×1×1) after it."""
    inputs, share, *kernel = first.shape
    spread = first.new_zeros(inputs, inputs, *kernel)
    for channel in range(inputs):
        start = channel // share * share
        spread[channel, start : start + share] = first[channel]
    return torch.einsum("oi,ijhw->ojhw", second[:, :, 0, 0], spread)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_grouped_split_is_the_best_per_group(groups: int) -> None:
    weight = _randn(6, 8, 3, 3)
    first, second = split_grouped(weight, groups)
    share = 8 // groups
    best = sum(
        torch.linalg.svdvals(weight[:, start : start + share].reshape(6, -1))[share:].square().sum()
        for start in range(0, 8, share)
    )
    torch.testing.assert_close((_dense(first, groups, second) - weight).square().sum(), torch.as_tensor(best))


def test_enough_rank_reproduces_the_convolution() -> None:
    """With as many channels in a group as outputs the split loses nothing."""
    weight, image = _randn(3, 8, 3, 3).float(), _randn(2, 8, 6, 6).float()
    spec = ConvSpec(kind="group2", in_channels=8, out_channels=3, kernel_size=3, padding=1, bias=True)
    conv, bias = build_conv(spec), torch.randn(3)
    with torch.no_grad():
        approximate(conv, spec, weight, bias)
    torch.testing.assert_close(conv(image), F.conv2d(image, weight, bias, padding=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["depthwise", "blueprint", "group4"])
def test_what_is_separable_is_reproduced(kind: str) -> None:
    """A kernel that is a 1×1 times one stencil is of rank one in every sense."""
    weight, image = torch.randn(5, 8, 1, 1) * torch.randn(1, 1, 3, 3), torch.randn(2, 8, 6, 6)
    spec = ConvSpec(kind=kind, in_channels=8, out_channels=5, kernel_size=3, padding=1, bias=True)
    conv, bias = build_conv(spec), torch.randn(5)
    with torch.no_grad():
        approximate(conv, spec, weight, bias)
    torch.testing.assert_close(conv(image), F.conv2d(image, weight, bias, padding=1), rtol=1e-4, atol=1e-4)


def test_blueprint_split_is_the_best_per_output() -> None:
    weight = _randn(4, 6, 3, 3)
    first, second = split_blueprint(weight)
    rest = torch.linalg.svdvals(weight.flatten(2))[:, 1:].square().sum()
    torch.testing.assert_close((first * second - weight).square().sum(), rest)


@given(channels=st.integers(1, 6), seed=st.integers(0, 99))
def test_taps_are_dealt_optimally(channels: int, seed: int) -> None:
    """Against every way to deal up to six channels to four taps."""
    energy = _randn(channels, 4, seed=seed).abs()
    shares = tap_shares(channels, 2)
    dealt = [tap for tap, share in enumerate(shares) for _ in range(share)]
    best = max(sum(energy[c, t].item() for c, t in zip(order, dealt, strict=True)) for order in _orders(channels))
    taps = assign_taps(energy, shares)
    assert sorted(taps.tolist()) == dealt
    assert math.isclose(energy[range(channels), taps].sum().item(), best)


def _orders(channels: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(channels)))


def test_a_shift_of_shifted_kernels_is_exact() -> None:
    """A dense kernel with one tap per input channel, as many channels at each tap as a shift deals out."""
    spec = ConvSpec(kind="shift", in_channels=18, out_channels=5, kernel_size=3, padding=1, bias=False)
    taps = torch.arange(9).repeat(2)[torch.randperm(18)]
    weight = torch.zeros(5, 18, 9)
    weight[:, torch.arange(18), taps] = torch.randn(5, 18)
    weight = weight.view(5, 18, 3, 3)
    conv, image = build_conv(spec), torch.randn(2, 18, 7, 7)
    with torch.no_grad():
        approximate(conv, spec, weight, None)
    torch.testing.assert_close(conv(image), F.conv2d(image, weight, padding=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(3, 5), (5, 7), (5, 3), (3, 3)])
def test_kernels_keep_their_centre(old: int, new: int) -> None:
    weight = torch.randn(2, 3, old, old)
    resized = resize_kernel(weight, new)
    assert resized.shape == (2, 3, new, new)
    torch.testing.assert_close(resized[..., new // 2, new // 2], weight[..., old // 2, old // 2])
    if new >= old:
        image = torch.randn(1, 3, 8, 8)
        torch.testing.assert_close(
            F.conv2d(image, resized, padding=new // 2), F.conv2d(image, weight, padding=old // 2)
        )


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_effective_weight_is_what_the_layer_applies(kind: type[nn.Conv2d]) -> None:
    conv, image = kind(4, 6, 3, padding=1, bias=False), torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(F.conv2d(image, effective_weight(conv), padding=1), conv(image))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_the_identity_inherits_everything(name: str) -> None:
    network, subject = real(name), family(name)
    student = inherit_student(network, subject.analysis, subject.analysis.identity)
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto", "tf_efficientnet_lite0"])
def test_larger_kernels_change_nothing(name: str) -> None:
    network, subject = real(name), family(name)
    larger = {b.name: max(b.kernels, default=None) for b in subject.analysis.blocks}
    genotype = Genotype.of(
        {
            b.name: next(
                c for c in b.choices if (c.kernel_size, c.width, c.conv) == (larger[b.name], 1, b.default.conv)
            )
            for b in subject.analysis.blocks
        }
    )
    student = inherit_student(network, subject.analysis, genotype)
    image = torch.randn(1, *subject.input_size)
    # a larger kernel of stride 2 sees other pixels where TensorFlow pads: its centre moves with an even image's
    if name != "tf_efficientnet_lite0":
        torch.testing.assert_close(student(image), network(image), rtol=1e-3, atol=1e-3)
    assert any(len(block.kernels) > 1 for block in subject.analysis.blocks)


def test_the_largest_channels_are_kept() -> None:
    network, subject = real("resnet18"), family("resnet18")
    block = subject.analysis.block("layer1.0")
    (channels,) = block.channels
    loud = [3, 17, 40, 41, 42, 50, 60, 63]
    with torch.no_grad():
        network.layer1[0].conv1.weight[loud] *= 100
    importance = unit_importance(network, subject.analysis)
    order = np.argsort(-importance[channels.segments[0]])
    assert sorted(order[: len(loud)].tolist()) == loud


def test_importance_can_be_computed_once() -> None:
    network, subject = real("resnet18"), family("resnet18")
    importance = unit_importance(network, subject.analysis)
    genotype = subject.genotype(6)
    one = inherit_student(network, subject.analysis, genotype, importance=importance)
    two = inherit_student(network, subject.analysis, genotype)
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def test_a_shift_takes_its_factor_to_the_batch_norm() -> None:
    """Depthwise kernels of one tap each, as a shift would deal them: nothing is lost, signs included."""
    network, subject = real("mobilenetv2_100"), family("mobilenetv2_100")
    identity = dict(subject.analysis.identity)
    block = next(b for b in subject.analysis.blocks if "shift" in b.convs and len(b.sites) == 1)
    conv = network.get_submodule(block.sites[0].module)
    shares = tap_shares(conv.in_channels, conv.kernel_size[0])
    taps = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))[torch.randperm(conv.in_channels)]
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight.flatten(1)[torch.arange(conv.in_channels), taps] = torch.randn(conv.in_channels) + 0.1
    shift = next(
        c for c in block.choices if (c.width, c.conv, c.kernel_size) == (1, "shift", block.default.kernel_size)
    )
    student = inherit_student(network, subject.analysis, {**identity, block.name: shift})
    assert isinstance(student.get_submodule(block.sites[0].module), Shift2d)
    image = torch.randn(1, *subject.input_size)
    expected = network(image)
    torch.testing.assert_close(student(image), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_larger_kernel_computes_what_the_smaller_one_would() -> None:
    """The zeros around a grown kernel make a rank-deficient matrix on which single-precision LAPACK gives up."""
    torch.manual_seed(0)
    weight, image = torch.randn(32, 64, 3, 3), torch.randn(2, 64, 9, 9)
    for kind in ("depthwise", "blueprint", "group4"):
        outputs = []
        for size in (3, 5):
            spec = ConvSpec(kind=kind, in_channels=64, out_channels=32, kernel_size=size, padding=size // 2)
            conv = build_conv(spec)
            with torch.no_grad():
                approximate(conv, spec, weight, None)
                outputs.append(conv(image))
        assert torch.allclose(*outputs, atol=1e-4)


def test_a_matrix_on_which_single_precision_gives_up_is_factored_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh, asked = torch.linalg.eigh, []

    def fails_in_single(gram: torch.Tensor) -> object:
        asked.append(gram.dtype)
        if gram.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return eigh(gram)

    matrix = torch.randn(3, 6, 8)
    expected = torch.matmul(*low_rank(matrix, 2))
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    assert torch.allclose(torch.matmul(*low_rank(matrix, 2)), expected, atol=1e-4)
    assert asked == [torch.float32, torch.float64]
