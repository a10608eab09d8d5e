from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas_kd.analysis.labels import FROZEN
from nas_kd.analysis.trace import Trace, trace, without_storage
from nas_kd.errors import ModelError


class _Miniature(nn.Module):
    """The example of `labels`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
        self.head = nn.Conv2d(2, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x)
        return self.head(self.conv2(first.relu()) + first)


def _axis(traced: Trace, name: str, dim: int = 0) -> list[int]:
    labels = traced.axes[name][dim]
    assert labels is not None
    return labels.tolist()


def test_the_miniature() -> None:
    traced = trace(_Miniature(), (3, 4, 4))
    units = _axis(traced, "conv1.weight")
    assert len({*units, FROZEN}) == 3
    assert _axis(traced, "conv1.weight", 1) == [FROZEN] * 3
    assert _axis(traced, "conv2.weight") == _axis(traced, "conv2.weight", 1) == units
    assert _axis(traced, "head.weight", 1) == units
    assert _axis(traced, "head.weight") == [FROZEN] * 4


class _Function(nn.Module):
    """8 channels through a function, then a convolution."""

    def __init__(self, function: object, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(channels, 2, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.conv(x)))


OPERATORS = {
    "relu": (lambda x: x.relu_(), "abcdefgh"),
    "cat": (lambda x: torch.cat([x, x], 1), "abcdefghabcdefgh"),
    "sum of halves": (lambda x: x[:, :4] + x[:, 4:], "abcd"),
    "chunk and swap": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "efghabcd"),
    "flip": (lambda x: x.flip(1), "hgfedcba"),
    "permute there and back": (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), "abcdefgh"),
    "pool": (lambda x: F.adaptive_avg_pool2d(x, 1), "abcdefgh"),
    "pool in another layout": (
        lambda x: F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1),
        "abcdefgh",
    ),
    "overlapping windows": (lambda x: x.as_strided((1, 8, 5, 6), (288, 36, 6, 1)), "........"),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), "abcdefgh"),
    "flatten and back": (lambda x: x.mean((2, 3)).flatten(1)[:, :, None, None], "abcdefgh"),
    "zero channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), ".abcdefgh."),
    "every other": (lambda x: x[:, ::2], "aceg"),
    "groups to a dimension": (lambda x: x.view(x.shape[0], 2, 4, *x.shape[2:]).sum(1), "abcd"),
    "gate": (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), "abcdefgh"),
    "softmax over channels": (lambda x: x.softmax(1), "abcdefgh"),
    "expand": (lambda x: x * torch.ones(8, 1, 1, device=x.device).expand(1, 8, 1, 1), "........"),
    "one channel": (lambda x: x[:, 3][:, None], "."),
    "sorted": (lambda x: x.sort(1).values, "........"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_pass_labels_on(name: str) -> None:
    """What reaches the head: each letter is a channel of the first convolution, a dot one that must stay."""
    function, expected = OPERATORS[name]
    traced = trace(_Function(function, len(expected)), (3, 6, 6))
    call = next(call for call in traced.calls if call.module == "head")
    order = _axis(traced, "conv.weight")
    letters = dict(zip(reversed(order), "hgfedcba", strict=True)) | {FROZEN: "."}  # of tied ones the first
    reached = [FROZEN] * len(expected) if call.inputs is None else call.inputs.tolist()
    assert "".join(letters[label] for label in reached) == expected


def test_tied_halves_are_one_unit() -> None:
    traced = trace(_Function(lambda x: x[:, :4] + x[:, 4:], 4), (3, 6, 6))
    order = _axis(traced, "conv.weight")
    assert order[:4] == order[4:]
    assert [len(split.parts) for split in traced.splits] == [2, 2]


def test_unknown_operators_are_named() -> None:
    traced = trace(_Function(lambda x: x.sort(1).values), (3, 6, 6))
    assert [(module, name.split(".")[1]) for module, name in traced.unknown] == [("", "sort")]
    assert _axis(traced, "conv.weight") == [FROZEN] * 8


@pytest.mark.parametrize(("groups", "units"), [(1, 8), (2, 4), (4, 4), (8, 8)])
def test_groups(groups: int, units: int) -> None:
    """Two groups are thinned out alike, more are dropped whole, a depthwise convolution follows its input."""
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(8, 2, 1))
    traced = trace(network, (3, 6, 6))
    assert len(set(_axis(traced, "0.weight"))) == units


def test_costs_of_calls() -> None:
    traced = trace(_Miniature(), (3, 5, 7))
    macs = [call.factor * int(np.prod([len(axis) for axis in call.axes])) for call in traced.calls]
    assert macs == [35 * 3 * 2, 35 * 2 * 2, 35 * 2 * 4]


def test_norms_and_shortcuts_are_noted() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.other, self.late = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.late(self.other(self.norm(self.conv(x))).relu_())

    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 1), Block(), nn.Conv2d(4, 2, 1)), (3, 6, 6))
    assert traced.norms == {"1.conv": "1.norm"}  # between `other` and `late` stands a ReLU
    assert traced.residual == ("1",)


def test_a_network_that_never_ends() -> None:
    """An operator a second: after the limit the user gets a line, not a hang."""
    with pytest.raises(ModelError, match="_Miniature takes longer than 20 s to analyse: it is not supported"):
        trace(_Miniature(), (3, 4, 4), clock=map(float, itertools.count(0, 15)).__next__)


def test_a_network_that_cannot_run() -> None:
    with pytest.raises(ModelError, match=r"_Miniature cannot run on 5×4×4 images: .*; try a larger --img-size"):
        trace(_Miniature(), (5, 4, 4))


def test_nothing_is_changed() -> None:
    network = _Miniature().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    trace(network, (3, 4, 4))
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not network.conv1._forward_hooks


def test_copies_without_storage() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    network[0].extra = torch.ones(2)
    copied = without_storage(network)
    assert all(tensor.is_meta for tensor in copied.state_dict().values())
    assert copied[0].extra.is_meta
    assert copied.state_dict().keys() == network.state_dict().keys()
    assert not any(tensor.is_meta for tensor in network.state_dict().values())


def test_other_precisions() -> None:
    assert len(trace(_Miniature().double(), (3, 4, 4)).calls) == 3
    assert len(trace(_Miniature().bfloat16(), (3, 4, 4)).calls) == 3
