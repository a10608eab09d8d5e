"""Augmentation of uint8 image batches as tensor operations, every draw from a given seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from nas_kd.errors import DataError

PADDINGS = ("zero", "reflect")
# a mirrored digit or letter is another sign; clothes, animals and things stay what they are
_NO_FLIP = frozenset({"digits", "torch/mnist", "torch/kmnist", "torch/qmnist", "torch/svhn"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Random shifts of up to `shift` of the image's side (0–0.5) in both directions, and mirroring when `flip`.

    `padding` fills what a shift uncovers: `zero` or `reflect`. Raises DataError for a value outside its range.
    """

    shift: float = 1 / 8
    flip: bool = True
    padding: str = "zero"

    def __post_init__(self) -> None:
        if not 0 <= self.shift <= 0.5:
            raise DataError(f"shift must lie in [0, 0.5], got {self.shift!r}")
        if self.padding not in PADDINGS:
            raise DataError(f"padding must be one of {', '.join(PADDINGS)}, got {self.padding!r}")


@dataclass(frozen=True, slots=True)
class Draw:
    """What was drawn for N images: `shifts`, N×2 int64 (down, right), and `flips`, N bool."""

    shifts: Tensor
    flips: Tensor

    def __getitem__(self, indices: Tensor) -> Draw:
        return Draw(self.shifts[indices], self.flips[indices])


def default_augmentation(dataset: str) -> Augmentation:
    """The augmentation for a dataset's name; signs (digits, letters) are not mirrored."""
    return Augmentation(flip=dataset.lower() not in _NO_FLIP)


def derive_seed(*parts: int | str) -> int:
    """One 63-bit seed from several parts, so that epochs, views and trials get independent streams.

    >>> derive_seed(1, "epoch", 2) == derive_seed(1, "epoch", 2) != derive_seed(1, "epoch", 3)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def draw(count: int, size: int, augmentation: Augmentation, generator: torch.Generator) -> Draw:
    """Draws for `count` images of `size`×`size` pixels, on the CPU."""
    reach = round(size * augmentation.shift)
    shifts = torch.randint(-reach, reach + 1, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    return Draw(shifts, flips if augmentation.flip else torch.zeros_like(flips))


def apply(pixels: Tensor, drawn: Draw, padding: str = "zero") -> Tensor:
    """The N×C×H×W images shifted and mirrored as drawn; same shape, dtype and device.

    Every image is gathered from its source by row and column index: no loop, no padded copy.
    """
    count, channels, height, width = pixels.shape
    device = pixels.device
    rows = torch.arange(height, device=device) - drawn.shifts[:, :1].to(device)
    columns = torch.arange(width, device=device) - drawn.shifts[:, 1:].to(device)
    columns = torch.where(drawn.flips[:, None].to(device), columns.flip(1), columns)
    images = torch.arange(count, device=device)[:, None, None, None]
    planes = torch.arange(channels, device=device)[None, :, None, None]
    source_rows, source_columns = _reflect(rows, height), _reflect(columns, width)
    moved = pixels[images, planes, source_rows[:, None, :, None], source_columns[:, None, None, :]]
    if padding == "zero":
        inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None]
        moved = moved * inside
    return moved


def augment(pixels: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Randomly shifted and mirrored copies of N×C×H×W images; every draw comes from `generator` (CPU)."""
    drawn = draw(len(pixels), pixels.shape[-1], augmentation, generator)
    return apply(pixels, drawn, augmentation.padding)


def _reflect(index: Tensor, length: int) -> Tensor:
    # ... 2 1 | 0 1 2 ... n-1 | n-2 ..., the edge not repeated
    index = index.abs().clamp(max=2 * (length - 1))
    return torch.where(index < length, index, 2 * (length - 1) - index)
