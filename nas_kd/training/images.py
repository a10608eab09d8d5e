"""Images in memory, and how they reach a network: plain, augmented, or as batches with a teacher's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from nas_kd.errors import DataError
from nas_kd.training.augment import Augmentation, Draw, apply, derive_seed, draw


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """N labelled images and how a network wants them normalised.

    `pixels` N×C×H×W uint8, `labels` N int64, `mean` and `std` one value per channel on the scale 0–1. The pixels may
    be memory-mapped. Raises DataError when they do not fit together or there is no image.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.dtype != torch.uint8:
            raise DataError(f"images must be N×C×H×W uint8, got {tuple(self.pixels.shape)} {self.pixels.dtype}")
        if len(self.pixels) == 0 or self.labels.shape != (len(self.pixels),):
            raise DataError(f"{len(self.pixels)} images with labels of shape {tuple(self.labels.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.min() < 0:
            raise DataError(f"labels must be int64 and count from 0, got {self.labels.dtype} from {self.labels.min()}")
        channels = self.pixels.shape[1]
        numbers = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0 or not numbers:
            raise DataError(f"{channels} channels need as many means and positive stds: got {self.mean}, {self.std}")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: Tensor | slice) -> Images:
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    @property
    def bytes(self) -> int:
        """The size of the pixels."""
        return self.pixels.numel()

    def to(self, device: torch.device) -> Images:
        """The same images on `device`."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B images for one training step: `pixels` B×C×H×W uint8, `labels` B int64, the teacher's `logits` B×K or None."""

    pixels: Tensor
    labels: Tensor
    logits: Tensor | None


class TrainingData(Protocol):
    """What the training loop needs: the same N images in every epoch, seen differently."""

    @property
    def mean(self) -> tuple[float, ...]:
        """One value per channel, scale 0–1."""

    @property
    def std(self) -> tuple[float, ...]:
        """One value per channel, scale 0–1."""

    @property
    def bytes(self) -> int:
        """What `to` would put on a device."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> TrainingData:
        """The same data on `device`."""

    def batch(self, epoch: int, indices: Tensor) -> Batch:
        """The images `indices` (B int64) as epoch `epoch` (from 0) sees them; does not depend on the other images."""


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """(pixels / 255 − mean) / std as float32 on `device`; pixels N×C×H×W uint8, one mean and std per channel."""
    offset = torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255
    scale = 1 / (torch.tensor(std, device=device).view(1, -1, 1, 1) * 255)
    return (pixels.to(device, non_blocking=True).float() - offset) * scale


@dataclass(frozen=True, slots=True, eq=False)
class AugmentedImages:
    """Training images with fresh augmentation in every epoch, decided by `seed` alone; there are no teacher logits."""

    images: Images
    augmentation: Augmentation
    seed: int = 0
    _drawn: dict[int, Draw] = field(default_factory=dict, repr=False)  # of the current epoch

    def __len__(self) -> int:
        return len(self.images)

    @property
    def mean(self) -> tuple[float, ...]:
        return self.images.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.images.std

    @property
    def bytes(self) -> int:
        return self.images.bytes

    def to(self, device: torch.device) -> AugmentedImages:
        """The same data on `device`; augmentation then runs there."""
        return AugmentedImages(self.images.to(device), self.augmentation, self.seed)

    def batch(self, epoch: int, indices: Tensor) -> Batch:
        """The images `indices` (B int64), augmented for `epoch`; an image does not depend on the rest of its batch."""
        local = indices.to(self.images.pixels.device)
        pixels = apply(self.images.pixels[local], self._draw(epoch)[indices.cpu()], self.augmentation.padding)
        return Batch(pixels, self.images.labels[local], None)

    def sample(self, count: int) -> Images:
        """The first `count` images as epoch 0 sees them, e.g. to recalibrate batch norms."""
        indices = torch.arange(min(count, len(self)))
        return replace(self.images[indices], pixels=self.batch(0, indices).pixels)

    def _draw(self, epoch: int) -> Draw:
        if epoch not in self._drawn:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment", epoch))
            size = self.images.pixels.shape[-1]
            self._drawn.clear()
            self._drawn[epoch] = draw(len(self), size, self.augmentation, generator)
        return self._drawn[epoch]
