"""Convolutions on maps smaller than their kernels compute the taps alone that meet a pixel.

At a total stride of 32 an image of up to 32 pixels is one pixel in the last stage. One tap of a 3×3 kernel meets it,
the other eight multiply padding, and oneDNN multiplies all the same, some six times as long for 512 channels
(docs/results/small_maps.md). What comes out is equal up to rounding; the other taps' gradients are zero, as before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

_WORTH = 0.4  # of the taps: with more of them what is copied takes what is saved
Taps = tuple[slice, slice, tuple[int, int]]


@contextmanager
def reached_taps(network: nn.Module) -> Iterator[None]:
    """Inside the block the plain convolutions of a network on the CPU leave out the taps that no pixel meets. Blocks
    may be nested."""
    changed = [module for module in network.modules() if isinstance(module, nn.Conv2d) and _may_leave_out(module)]
    for module in changed:
        module.forward = functools.partial(_convolve, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _may_leave_out(module: nn.Conv2d) -> bool:
    if type(module) is not nn.Conv2d or "forward" in vars(module) or isinstance(module.padding, str):
        return False  # a user's own, one that is hidden already, or padded on one side more
    is_plain = module.padding_mode == "zeros" and module.dilation == (1, 1) and max(module.padding) > 0
    return is_plain and module.weight.device.type == "cpu"


def _convolve(module: nn.Conv2d, images: Tensor) -> Tensor:
    taps = _taps(module, images.shape[-2:]) if images.ndim == 4 else None
    if taps is None:
        return nn.Conv2d.forward(module, images)
    rows, columns, padding = taps
    weight = module.weight[:, :, rows, columns]
    return F.conv2d(images, weight, module.bias, module.stride, padding, groups=module.groups)


def _taps(module: nn.Conv2d, size: tuple[int, ...]) -> Taps | None:
    """The rows and columns of a kernel that meet a pixel of such maps, with the padding that is left; None where they
    are too many."""
    assert not isinstance(module.padding, str)
    (rows, above), (columns, left) = map(_side, size, module.kernel_size, module.stride, module.padding)
    reached = (rows.stop - rows.start) * (columns.stop - columns.start)
    if reached > _WORTH * module.kernel_size[0] * module.kernel_size[1]:
        return None
    return rows, columns, (above, left)


def _side(size: int, kernel: int, stride: int, padding: int) -> tuple[slice, int]:
    """The taps of one dimension that meet a pixel, and its padding then: all of them where that would be another on
    either side."""
    written = (size + 2 * padding - kernel) // stride + 1
    first, end = max(0, padding - (written - 1) * stride), min(kernel, size + padding)
    left = padding - first
    if end <= first or (size + 2 * left - (end - first)) // stride + 1 != written:
        return slice(0, kernel), padding
    return slice(first, end), left
