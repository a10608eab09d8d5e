"""How training images are augmented, as a value: shift and flip for tiny ones, timm's own transforms for photos.

Shift and flip are here too, as tensor operations on uint8 batches; the transforms of photos are in `photos`. Every draw
comes from a given seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import Tensor

from nas_kd.data.augmentation_names import ERASE_MODES, INTERPOLATIONS
from nas_kd.errors import DataError

PADDINGS = ("zero", "reflect")
# a mirrored digit or letter is another sign; clothes, animals and things stay what they are
_NO_FLIP = frozenset({"digits", "torch/mnist", "torch/kmnist", "torch/qmnist", "torch/svhn"})
SCALE = (0.7, 1.0)  # not timm's (0.08, 1): after three epochs of distillation 61 % instead of 49 at (0.35, 1)
PHOTO_SIZE = 64  # pixels from which on an image is taken for a photo: below, a crop leaves too little
_PHOTOS = frozenset({"", "folder", "wds", "imagefolder", "image_folder", "torch/folder", "torch/image_folder",
                     "torch/imagenet", "torch/places365"})  # fmt: skip


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PhotoAugmentation:
    """timm's augmentation of photos (`timm.data.create_transform(is_training=True)`), with its names and meanings.

    A crop with a share `scale` of the area and an aspect ratio within `ratio` is resized by `interpolation`, then
    mirrored with the probabilities `hflip` and `vflip`; `auto_augment` (such as rand-m9-mstd0.5), or else
    `color_jitter`, changes it further, and with the probability `re_prob` a rectangle is erased (`re_mode`: const is
    the mean colour, rand one colour, pixel noise). Raises DataError for a value outside its range.
    """

    scale: tuple[float, float] = SCALE
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | None = None
    auto_augment: str | None = None
    interpolation: str = "random"
    re_prob: float = 0.0
    re_mode: str = "pixel"

    def __post_init__(self) -> None:
        for name, fine, legal in self._ranges():
            if not fine:
                raise DataError(f"{name} must be {legal}, got {getattr(self, name)!r}")
        if self.auto_augment is None:
            return
        try:
            make_auto_augment(self.auto_augment, {})
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"timm cannot read auto_augment {self.auto_augment!r}: write it like rand-m9-mstd0.5, augmix-m3, "
                "original, v0 or 3a"
            ) from error
        if self.color_jitter and "3a" not in self.auto_augment:
            raise DataError(
                f"timm leaves color_jitter out beside auto_augment {self.auto_augment!r}: leave one of them out"
            )

    def _ranges(self) -> Iterable[tuple[str, bool, str]]:
        yield "scale", len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1, "two shares in (0, 1], rising"
        yield "ratio", len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1] < math.inf, "two rising ratios > 0"
        for name in ("hflip", "vflip", "re_prob"):
            yield name, 0 <= getattr(self, name) <= 1, "a probability in [0, 1]"
        yield "color_jitter", self.color_jitter is None or 0 <= self.color_jitter < math.inf, "0 or more"
        yield "interpolation", self.interpolation in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"
        yield "re_mode", self.re_mode in ERASE_MODES, f"one of {', '.join(ERASE_MODES)}"


@dataclass(frozen=True, slots=True)
class Draw:
    """What was drawn for N images: `shifts`, N×2 int64 (down, right), and `flips`, N bool."""

    shifts: Tensor
    flips: Tensor

    def __getitem__(self, indices: Tensor) -> Draw:
        return Draw(self.shifts[indices], self.flips[indices])

    def to(self, device: torch.device) -> Draw:
        """The same on `device`."""
        return Draw(self.shifts.to(device), self.flips.to(device))


AnyAugmentation = Augmentation | PhotoAugmentation


def default_augmentation(dataset: str, img_size: int = 32) -> AnyAugmentation:
    """The augmentation for a dataset's name and the side of its images: that of photos where they are photos of 64
    pixels or more, else shift and flip. Signs (digits, letters) are not mirrored."""
    if img_size >= PHOTO_SIZE and dataset.lower() in _PHOTOS:
        return PhotoAugmentation()
    return Augmentation(flip=may_be_mirrored(dataset))


def may_be_mirrored(dataset: str) -> bool:
    """Whether a mirrored image of this dataset is still of its class: not so for digits and letters."""
    return dataset.lower() not in _NO_FLIP


def make_auto_augment(config: str, parameters: dict[str, object]) -> object:
    """timm's transform of this configuration, as its own factory makes it."""
    for start, make in (("rand", rand_augment_transform), ("augmix", augment_and_mix_transform)):
        if config.startswith(start):
            return make(config, parameters)
    return auto_augment_transform(config, parameters)


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
