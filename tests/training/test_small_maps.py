"""Convolutions that leave out the taps that no pixel meets: the same numbers, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nas_kd.training.small_maps import _taps, reached_taps


def gradients(module: nn.Module, images: Tensor) -> Iterator[Tensor]:
    images = images.clone().requires_grad_(True)
    written = module(images)
    (written * torch.linspace(0.5, 1.5, written.numel(), dtype=written.dtype).reshape(written.shape)).sum().backward()
    yield written.detach()
    yield images.grad  # type: ignore[misc]
    for parameter in module.parameters():
        assert parameter.grad is not None
        yield parameter.grad.clone()


@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    groups=st.sampled_from([1, 2, 4]),
)
def test_the_same_maps_and_gradients(
    size: tuple[int, int], kernel: tuple[int, int], stride: int, padding: tuple[int, int], groups: int
) -> None:
    if any(own + 2 * pad < reach for own, pad, reach in zip(size, padding, kernel, strict=True)):
        return  # the kernel does not fit
    torch.manual_seed(0)
    module = nn.Conv2d(4, 4, kernel, stride, padding, groups=groups).double()
    images = torch.randn(2, 4, *size, dtype=torch.float64)
    wanted = list(gradients(module, images))
    module.zero_grad()
    with reached_taps(module):
        got = list(gradients(module, images))
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "reached"),
    [
        (1, 3, 1, 1),
        (1, 3, 2, 1),
        (1, 5, 1, 1),
        (2, 5, 1, 9),
        (2, 7, 1, 9),
        (2, 3, 1, None),
        (2, 3, 2, None),
        (4, 3, 1, None),
    ],
)
def test_which_taps_are_reached(size: int, kernel: int, stride: int, reached: int | None) -> None:
    taps = _taps(nn.Conv2d(1, 1, kernel, stride, kernel // 2), (size, size))
    found = None if taps is None else (taps[0].stop - taps[0].start) * (taps[1].stop - taps[1].start)
    assert found == reached


def test_a_network_is_what_it_was_before() -> None:
    network = timm.create_model("test_resnet", num_classes=4).eval()
    images = torch.randn(2, 3, 32, 32)
    before = network(images)
    with reached_taps(network):
        changed = [module for module in network.modules() if "forward" in vars(module)]
        assert changed
        assert torch.allclose(network(images), before, atol=1e-5)
        with reached_taps(network):  # a look in the midst of a training
            assert torch.allclose(network(images), before, atol=1e-5)
        assert all("forward" in vars(module) for module in changed)
        assert torch.allclose(copy.deepcopy(network)(images), before, atol=1e-5)
    assert not any("forward" in vars(module) for module in network.modules())
    assert torch.equal(network(images), before)


def test_what_is_no_plain_convolution_is_left_alone() -> None:
    class Own(nn.Conv2d):
        """Of a user: nobody knows what it does."""

    others = [
        Own(2, 2, 3, padding=1),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 2, 3, padding=2, dilation=2),
        nn.Conv2d(2, 2, 1),
        nn.Conv2d(2, 2, 3, padding=1, device="meta"),
    ]
    with reached_taps(nn.ModuleList(others)):
        assert not any("forward" in vars(module) for module in others)
