"""Mixup, CutMix and label smoothing by timm's `Mixup`, each image with a partner and a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor

from nas_kd.data.photos import own_randomness, seed_everything
from nas_kd.errors import DataError

Labelled = tuple[Tensor, Tensor]  # pixels B×C×H×W uint8, labels B int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """How images are mixed and labels smoothed, with the names and meanings of timm's `train.py`.

    `mixup` and `cutmix` are the α of the Beta distributions, 0 for none; with the probability `mixup_prob` an image is
    mixed, where both are given by CutMix with the probability `mixup_switch_prob`. `smoothing` moves that share of
    each label to all `num_classes` evenly. Raises DataError for a value outside its range, and when nothing is to be
    done.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name, fine, legal in self._ranges():
            if not fine:
                raise DataError(f"{name} must be {legal}, got {getattr(self, name)!r}")
        if not (self.mixes or self.smoothing):
            raise DataError("mixing needs mixup, cutmix or smoothing above 0")

    def _ranges(self) -> Iterable[tuple[str, bool, str]]:
        yield "num_classes", self.num_classes >= 2, "at least 2"
        for name in ("mixup", "cutmix"):
            yield name, 0 <= getattr(self, name) < math.inf, "0 or more"
        for name in ("mixup_prob", "mixup_switch_prob"):
            yield name, 0 <= getattr(self, name) <= 1, "a probability in [0, 1]"
        yield "smoothing", 0 <= self.smoothing < 1, "in [0, 1)"

    @property
    def mixes(self) -> bool:
        """Whether pixels change, not labels alone."""
        return self.mixup > 0 or self.cutmix > 0


def mix_each(mixing: Mixing, images: Labelled, partners: Labelled, seeds: Sequence[int]) -> Labelled:
    """Each image mixed with its partner as timm's `Mixup` mixes a batch of these two, seeded by its own seed: pixels
    B×C×H×W uint8, and the classes' shares B×K float32, on the images' device."""
    mixup = Mixup(
        mixup_alpha=mixing.mixup,
        cutmix_alpha=mixing.cutmix,
        prob=mixing.mixup_prob,
        switch_prob=mixing.mixup_switch_prob,
        label_smoothing=mixing.smoothing,
        num_classes=mixing.num_classes,
    )
    pixels, shares = [], []
    with own_randomness():
        for pair, seed in zip(zip(*images, *partners, strict=True), seeds, strict=True):
            seed_everything(seed)
            mixed = mixup(torch.stack((pair[0], pair[2])).float(), torch.stack((pair[1], pair[3])))
            pixels.append(mixed[0][0].round().byte())
            shares.append(mixed[1][0])
    return torch.stack(pixels), torch.stack(shares)


def smoothed(labels: Tensor, mixing: Mixing) -> Tensor:
    """The classes' shares B×K float32 of unmixed images with the labels B int64."""
    certain = F.one_hot(labels, mixing.num_classes).float()
    return certain * (1 - mixing.smoothing) + mixing.smoothing / mixing.num_classes
