"""What int8 files and their closed form share: windows that slide over an image, and the order of operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

Pads = tuple[tuple[int, int], ...]  # before and after, by rows and columns
_POOLS = ("max_pool2d_with_indices", "avg_pool2d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How a window slides over an image of `size` (height, width): its `kernel`, `strides` and `dilations` by rows and
    columns, none of a mere padding, and what is padded around the image."""

    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: Pads = ((0, 0), (0, 0))

    def around(self, other: Window) -> Window:
        """The window over what `other` has padded, as one over what that was before."""
        sides = zip(self.pads, other.pads, strict=True)
        pads = tuple((one[0] + two[0], one[1] + two[1]) for one, two in sides)
        return replace(self, size=other.size, pads=pads)

    @property
    def after_padding(self) -> Window:
        """The window over an image that is padded already."""
        size = tuple(length + sum(pad) for length, pad in zip(self.size, self.pads, strict=True))
        return replace(self, size=size, pads=((0, 0), (0, 0)))

    @property
    def padded(self) -> int:
        """The pixels of an image with its padding as TensorFlow needs it: none where it pads that much of itself."""
        same = zip(self.size, self.kernel, self.strides, self.dilations, strict=True)
        if not any(map(sum, self.pads)) or self.pads == tuple(same_pads(*side) for side in same):
            return 0
        return math.prod(self.after_padding.size)


def same_pads(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """What TensorFlow's padding "same" adds before and after a side.

    >>> same_pads(32, 3, 2), same_pads(33, 3, 2), same_pads(32, 3, 1)
    ((0, 1), (1, 1), (1, 1))
    """
    reach = (kernel - 1) * dilation + 1
    total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


def window_of(operator: str, arguments: Sequence[Any]) -> Window | None:
    """The window of a call of an ATen operator with these arguments; None where it has none of two dimensions."""
    if not arguments:
        return None
    if operator == "convolution" and len(arguments[4]) == 2:
        image, weight, _, stride, padding, dilation = arguments[:6]
        kernel = weight.shape[2:]
    elif operator in _POOLS:
        image, kernel, stride, padding = [*arguments, None, None, None][:4]
        stride, padding, dilation = stride or kernel, padding or (0, 0), (1, 1)
    elif operator == "constant_pad_nd" and len(arguments[1]) == 4:
        left, right, top, bottom = arguments[1]
        return Window(size=tuple(arguments[0].shape[2:]), pads=((top, bottom), (left, right)))
    else:
        return None
    kernel, strides, sides, dilations = (tuple(_pair(value)) for value in (kernel, stride, padding, dilation))
    pads = tuple((side, side) for side in sides)
    return Window(size=tuple(image.shape[2:]), kernel=kernel, strides=strides, dilations=dilations, pads=pads)


def _pair(value: Sequence[int]) -> list[int]:
    numbers = [int(number) for number in value]
    return numbers * 2 if len(numbers) == 1 else numbers


def as_needed(needs: Sequence[Sequence[int]], ends: Sequence[int]) -> list[int]:
    """Put operators in the order in which a file has them: each right after what it needs, which comes in the order of
    its inputs. `needs` are by operator those whose results it reads, `ends` those whose results leave the network.

    >>> as_needed([[], [0], [0], [1, 2]], [3]), as_needed([[], [0], [0], [2, 1]], [3])
    ([0, 1, 2, 3], [0, 2, 1, 3])
    """
    order: dict[int, None] = {}
    waiting = list(reversed(ends))
    while waiting:
        number = waiting[-1]
        missing = [other for other in needs[number] if other not in order]
        if missing and number not in order:
            waiting.append(missing[0])
        else:
            order.setdefault(waiting.pop())
    return list(order)
