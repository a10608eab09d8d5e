"""Images in memory, and how they reach a network: plain, augmented, or as batches with a teacher's logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor

from nas_kd.data.augment import AnyAugmentation, Augmentation, Draw, apply, derive_seed, draw
from nas_kd.data.mixing import Mixing, mix_each, smoothed
from nas_kd.data.originals import Originals
from nas_kd.data.photos import PhotoTransform, transform_each
from nas_kd.data.prefetching import fitting, work_ahead
from nas_kd.errors import DataError

_SAMPLED = 64  # images of a sample that are made at once
In = TypeVar("In")
Out = TypeVar("Out")


class ImageSet(Protocol):
    """N labelled images of one form and how a network wants them normalised, in memory (`Images`) or on disk
    (`streaming.StreamedImages`)."""

    @property
    def labels(self) -> Tensor:
        """N int64."""

    @property
    def mean(self) -> tuple[float, ...]:
        """One value per channel, scale 0–1."""

    @property
    def std(self) -> tuple[float, ...]:
        """One value per channel, scale 0–1."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of an image."""

    @property
    def bytes(self) -> int:
        """The size of the pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor | slice) -> Self: ...

    def to(self, device: torch.device) -> Self:
        """The same images, on `device` if they are in memory."""

    def picture(self, index: int) -> Image.Image:
        """One image as a picture of mode L or RGB: the original where there is one."""

    def take(self, indices: Tensor) -> Tensor:
        """The pixels of the images `indices` (B int64), B×C×H×W uint8."""

    def ahead(self, work: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
        """What `work`, which looks at images, makes of each item; ahead of time where images take time."""

    def chunks(self, size: int) -> Iterator[Tensor]:
        """The pixels of all images in order, so many at a time."""

    def decoded(self) -> Images:
        """The same images in memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """N labelled images in memory, or mapped into it, and how a network wants them normalised.

    Attributes:
        pixels: N×C×H×W uint8.
        labels: N int64.
        mean: One value per channel, on the scale 0-1.
        std: As `mean`.
        originals: The same images before they were cropped and resized, where they are kept: photos are augmented from
            these.
        workers: Processes that do so ahead of time.

    Raises:
        DataError: When they do not fit together, or there is no image.

    Example:
        >>> import torch
        >>> from nas_kd import Images
        >>> pixels, labels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8) % 2
        >>> images = Images(pixels, labels, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        >>> len(images), images.shape, len(images[:2])
        (8, (3, 32, 32), 2)
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    originals: Originals | None = None
    workers: int = 0

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
        if self.originals is not None and len(self.originals) != len(self.pixels):
            raise DataError(f"{len(self.pixels)} images with {len(self.originals)} originals")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: Tensor | slice) -> Images:
        originals = None if self.originals is None else self.originals[indices]
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices], originals=originals)

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of an image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def bytes(self) -> int:
        """The size of the pixels."""
        return self.pixels.numel()

    def take(self, indices: Tensor) -> Tensor:
        """The pixels of the images `indices` (B int64), B×C×H×W uint8, on the images' device."""
        return self.pixels[indices.to(self.pixels.device, non_blocking=True)]

    def ahead(self, work: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
        """What `work`, which looks at images, makes of each item, when it is asked for: nothing takes time here."""
        return map(work, items)

    def chunks(self, size: int) -> Iterator[Tensor]:
        """The pixels of all images in order, so many at a time."""
        return iter(torch.split(self.pixels, size))

    def decoded(self) -> Images:
        """These."""
        return self

    def to(self, device: torch.device) -> Images:
        """The same images on `device`; originals stay where they are."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def picture(self, index: int) -> Image.Image:
        """One image as a picture of mode L or RGB: the original where there is one."""
        if self.originals is not None:
            return self.originals.image(index)
        pixels = self.pixels[index].cpu().permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B images for one training step: `pixels` B×C×H×W uint8, `labels` B int64, the teacher's `logits` B×K or None.

    Where images are mixed or labels smoothed, `labels` are the classes' shares, B×K float32.
    """

    pixels: Tensor
    labels: Tensor
    logits: Tensor | None

    @property
    def classes(self) -> Tensor:
        """The class of each image, B int64; of a mixed one the one that has the greatest share."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)


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

    def batches(self, epoch: int, order: Sequence[Tensor]) -> Iterator[Batch]:
        """The `batch` of each of these indices; images that are not in memory are decoded ahead of time."""


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """(pixels / 255 − mean) / std as float32 on `device`; pixels N×C×H×W uint8, one mean and std per channel."""
    offset, scale = _offset_and_scale(mean, std, device)
    return (pixels.to(device, non_blocking=True).float() - offset) * scale


@functools.lru_cache(maxsize=16)  # to make them anew would make a GPU wait at each step
def _offset_and_scale(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # they serve training too
        offset = torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255
        return offset, 1 / (torch.tensor(std, device=device).view(1, -1, 1, 1) * 255)


@dataclass(frozen=True, slots=True, eq=False)
class AugmentedImages:
    """Training images with fresh augmentation in every epoch, decided by `seed` alone; there are no teacher logits.

    With `mixing` each is mixed with another one, which is drawn for it anew in every epoch.
    """

    images: ImageSet
    augmentation: AnyAugmentation
    seed: int = 0
    mixing: Mixing | None = None
    _drawn: dict[int, Draw] = field(default_factory=dict, repr=False)  # of the current epoch
    _partners: dict[int, Tensor] = field(default_factory=dict, repr=False)

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
        """The same data on `device`; augmentation then runs there. Photos are augmented on the CPU and stay there."""
        if not isinstance(self.augmentation, Augmentation):
            return self
        return AugmentedImages(self.images.to(device), self.augmentation, self.seed, self.mixing)

    def batch(self, epoch: int, indices: Tensor) -> Batch:
        """The images `indices` (B int64), augmented for `epoch`; an image does not depend on the rest of its batch."""
        pixels, labels = self._seen(epoch, indices), self._labels(indices)
        if self.mixing is None:
            return Batch(pixels, labels, None)
        if not self.mixing.mixes:
            return Batch(pixels, smoothed(labels, self.mixing), None)
        others = self._partner(epoch)[indices.cpu()]
        seeds = self._seeds("mix", epoch, indices)
        partners = self._seen(epoch, others), self._labels(others)
        return Batch(*mix_each(self.mixing, (pixels, labels), partners, seeds), None)

    def batches(self, epoch: int, order: Sequence[Tensor]) -> Iterator[Batch]:
        """The `batch` of each of these indices; by worker processes where images stream, and of photos where they have
        some."""
        return self._ahead(functools.partial(self.batch, epoch), order)

    def sample(self, count: int) -> Images:
        """The first `count` images as epoch 0 sees them, unmixed, e.g. to recalibrate batch norms."""
        indices = torch.arange(min(count, len(self)))
        pieces = self._ahead(functools.partial(self._seen, 0), torch.split(indices, _SAMPLED))
        return Images(torch.cat(list(pieces)), self._labels(indices), self.mean, self.std)

    def _ahead(self, work: Callable[[Tensor], Out], order: Sequence[Tensor]) -> Iterator[Out]:
        """What `work` makes of the images of each of these indices."""
        workers = self._photo_workers(max(map(len, order), default=0))
        if not workers:
            return self.images.ahead(work, order)
        return work_ahead(work, order, processes=workers, source="the photos in memory")

    def _photo_workers(self, together: int) -> int:
        """How many processes transform photos that are in memory, so many at a time."""
        images = self.images
        if isinstance(self.augmentation, Augmentation) or not isinstance(images, Images):
            return 0
        return fitting(images.workers, together * math.prod(images.shape))

    def _labels(self, indices: Tensor) -> Tensor:
        return self.images.labels[indices.to(self.images.labels.device, non_blocking=True)]

    def _seen(self, epoch: int, indices: Tensor) -> Tensor:
        """The images `indices` as `epoch` sees them, before any are mixed."""
        augmentation = self.augmentation
        if isinstance(augmentation, Augmentation):
            pixels = self.images.take(indices)
            return apply(pixels, self._draw(epoch, pixels.device)[indices.to(pixels.device)], augmentation.padding)
        transform = PhotoTransform(augmentation, self.images.shape[-1], self.mean, self.std)
        photos = map(self.images.picture, indices.tolist())
        return transform_each(transform, photos, self._seeds("photo", epoch, indices))

    def _seeds(self, what: str, epoch: int, indices: Tensor) -> list[int]:
        return [derive_seed(self.seed, what, epoch, index) for index in indices.tolist()]

    def _partner(self, epoch: int) -> Tensor:
        """Which image each one is mixed with in `epoch`."""
        if epoch not in self._partners:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "partners", epoch))
            self._partners.clear()
            self._partners[epoch] = torch.randperm(len(self), generator=generator)
        return self._partners[epoch]

    def _draw(self, epoch: int, device: torch.device) -> Draw:
        if epoch not in self._drawn:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment", epoch))
            self._drawn.clear()
            assert isinstance(self.augmentation, Augmentation)
            self._drawn[epoch] = draw(len(self), self.images.shape[-1], self.augmentation, generator).to(device)
        return self._drawn[epoch]
