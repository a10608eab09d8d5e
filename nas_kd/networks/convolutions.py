"""Cheap convolutions; `cost_terms` says what each of them costs.

Each replaces one k×k convolution and is followed by whatever followed that one in its base (a batch norm and an
activation), so that a block reads `spatial → 1×1 → BN → activation` as in "Compressing CNNs with cheap convolutions
and online distillation" (arXiv 1909.13063); there is no norm between the two. `blueprint` turns the order round
(1×1 → depthwise: BSConv-U, arXiv 2003.13549).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from nas_kd.errors import PlanError
from nas_kd.genotype import group_count, is_conv_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvSpec:
    """One convolution to be built: its kind and its exact shape. `padding` is in pixels, or "same" as in TensorFlow.

    `channelwise` is True where the base's convolution is depthwise already: then nothing is added after its
    replacement, since the base has its own 1×1. Raises PlanError for numbers that make no convolution.
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int | str = "same"
    dilation: int = 1
    bias: bool = False
    channelwise: bool = False

    def __post_init__(self) -> None:
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.dilation)
        groups = group_count(self.kind)
        if not is_conv_kind(self.kind) or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise PlanError(f"not a convolution: {self}")
        if self.padding != "same" and (not isinstance(self.padding, int) or self.padding < 0):
            raise PlanError(f'a padding is "same" or a number of pixels, not {self.padding!r}')
        if groups is not None and self.in_channels % groups:
            raise PlanError(f"{self.in_channels} channels cannot be cut into {groups} groups")
        if self.channelwise and self.kind != "shift":
            raise PlanError(f"a depthwise convolution is replaced by shift alone, not by {self.kind}")


def build_conv(spec: ConvSpec) -> nn.Module:
    """The module for a cheap kind: `spatial` and `pointwise` convolutions, or a lone `Shift2d` when channelwise."""
    if spec.kind == "shift" and spec.channelwise:
        return Shift2d(spec)
    groups = group_count(spec.kind)
    inner, outer = spec.in_channels, spec.out_channels
    if spec.kind == "blueprint":
        return Pair(pointwise=nn.Conv2d(inner, outer, 1, bias=False), spatial=_spatial(spec, outer, outer, spec.bias))
    pointwise = nn.Conv2d(inner, outer, 1, bias=spec.bias)
    if spec.kind == "shift":
        return Pair(spatial=Shift2d(spec), pointwise=pointwise)
    return Pair(spatial=_spatial(spec, inner, groups or inner, False), pointwise=pointwise)


class Pair(nn.Sequential):
    """A spatial and a pointwise convolution, in the order given."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__(OrderedDict(parts))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        order, weight = state_dict.get(f"{prefix}spatial.order"), f"{prefix}pointwise.weight"
        if order is not None and weight in state_dict:  # of an earlier version: that was the order of its inputs
            state_dict[weight] = state_dict[weight].index_select(1, order.argsort())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _spatial(spec: ConvSpec, channels: int, groups: int, bias: bool) -> nn.Module:
    size, stride, dilation = spec.kernel_size, spec.stride, spec.dilation
    if spec.padding == "same":
        same = Conv2dSame(channels, channels, size, stride, 0, dilation, groups, bias)
        return cast(nn.Module, same)
    return nn.Conv2d(channels, channels, size, stride, int(spec.padding), dilation, groups, bias)


class Shift2d(nn.Module):
    """Displaces each channel by one of the k² taps of a kernel: no parameters, no MACs (Wu et al. 2017, Shift).

    N×C×H×W → N×C×H'×W', sizes as a k×k convolution's. The channels are dealt to the taps in equal shares; the buffer
    `taps` (C) says which tap, 0 … k²−1, each has. It runs as a depthwise convolution with one-hot kernels: one operator
    that every runtime has, two to six times as fast as slices that are put together again.
    """

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = spec.kernel_size, spec.stride, spec.dilation
        self.same = spec.padding == "same"
        self.padding = spec.dilation * (spec.kernel_size - 1) // 2 if self.same else int(spec.padding)
        self.shares = tap_shares(spec.in_channels, spec.kernel_size)
        self.taps: Tensor
        self.register_buffer("taps", self._dealt())
        self.bias = nn.Parameter(torch.zeros(spec.in_channels)) if spec.bias and spec.channelwise else None

    def _dealt(self) -> Tensor:
        """The taps in order, each as often as it has channels (C)."""
        return torch.tensor([tap for tap, share in enumerate(self.shares) for _ in range(share)])

    def forward(self, image: Tensor) -> Tensor:
        # made each time, in a tenth of the convolution's own: there is nothing to go stale
        one_hot = torch.zeros(self.taps.shape[0], self.kernel_size * self.kernel_size, device=self.taps.device)
        one_hot = one_hot.scatter_(1, self.taps.view(-1, 1), 1.0).to(image.dtype)
        kernels = one_hot.view(-1, 1, self.kernel_size, self.kernel_size)
        padding = self.padding
        if self.same and self.stride > 1:  # as TensorFlow pads: so much as the last stride needs, more of it after
            reach, padding = self.dilation * (self.kernel_size - 1), 0
            rows = reach - (image.shape[2] - 1) % self.stride
            columns = reach - (image.shape[3] - 1) % self.stride
            if reach < self.stride - 1:
                rows, columns = max(rows, 0), max(columns, 0)
            sides = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
            image = F.pad(image, sides, value=0.0)  # said, or ONNX Runtime does not fold it into the convolution
        return F.conv2d(image, kernels, self.bias, self.stride, padding, self.dilation, self.taps.shape[0])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        order = state_dict.pop(f"{prefix}order", None)
        if order is not None:  # of an earlier version: the channels of tap 0, then of tap 1, and so on
            state_dict[f"{prefix}taps"] = self._dealt().to(order.device)[order.argsort()]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{sum(self.shares)}, kernel_size={self.kernel_size}, stride={self.stride}"


def tap_shares(channels: int, kernel_size: int) -> list[int]:
    """How many channels each of the k² taps gets: as equal as can be, the centre and its neighbours first.

    >>> tap_shares(11, 3)
    [1, 1, 1, 2, 2, 1, 1, 1, 1]
    """
    taps = kernel_size**2
    centre = kernel_size // 2
    nearest = sorted(range(taps), key=lambda tap: math.dist(divmod(tap, kernel_size), (centre, centre - 0.1)))
    nearest.sort(key=lambda tap: math.dist(divmod(tap, kernel_size), (centre, centre)))
    shares = [channels // taps] * taps
    for tap in nearest[: channels % taps]:
        shares[tap] += 1
    return shares


PARTS = (build_conv, Pair, _spatial, Shift2d, tap_shares)  # what a convolution of ours is made of, for `definition.py`
