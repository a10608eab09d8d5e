"""Photos augmented by timm's own transforms, one image at a time, each from a seed of its own."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor

from nas_kd.data.augment import PhotoAugmentation

_GLOBAL_RANDOMNESS = threading.Lock()  # timm's transforms draw from it, so one thread at a time


class PhotoTransform:
    """What an augmentation does to a photo: a picture of any size in, C×S×S uint8 out. It draws from the generators of
    `random`, numpy and torch. `mean` and `std`, per channel on the scale 0–1, only matter for what is filled in."""

    def __init__(
        self, augmentation: PhotoAugmentation, img_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self._change: Callable[[Image.Image], Tensor] = transforms_imagenet_train(
            img_size,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            vflip=augmentation.vflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
            mean=tuple(mean),
            normalize=False,
        )
        self._erase = RandomErasing(augmentation.re_prob, mode=augmentation.re_mode, device="cpu")
        self._erases = augmentation.re_prob > 0
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, photo: Image.Image) -> Tensor:
        pixels = self._change(photo)
        return self._erased(pixels) if self._erases else pixels

    def _erased(self, pixels: Tensor) -> Tensor:
        # timm erases normalised images, in which 0 is the mean; what stays comes back to the bit
        normalised: Tensor = self._erase((pixels / 255 - self._mean) / self._std)
        return ((normalised * self._std + self._mean) * 255).round().clamp(0, 255).byte()


def transform_each(
    transform: Callable[[Image.Image], Tensor], photos: Iterator[Image.Image], seeds: Sequence[int]
) -> Tensor:
    """The photos transformed, N×C×S×S, each with the generators of `random`, numpy and torch seeded by its own seed;
    the caller's randomness is left alone."""
    with own_randomness():
        return torch.stack([_transform_one(transform, *pair) for pair in zip(photos, seeds, strict=True)])


def _transform_one(transform: Callable[[Image.Image], Tensor], photo: Image.Image, seed: int) -> Tensor:
    seed_everything(seed)
    return transform(photo)


def seed_everything(seed: int) -> None:
    """Seeds the generators of `random`, numpy and torch (CPU)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leaves the generators of `random`, numpy and torch (CPU) after the block as they were before; one thread at a
    time."""
    with _GLOBAL_RANDOMNESS:
        states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.default_generator.set_state(states[2])
