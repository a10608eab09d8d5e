"""The distillation cache: augmented views of the training images and the teacher's logits on them, computed once."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nas_kd.errors import DataError, TrainingError
from nas_kd.training.arrays import Array, ArrayFile, finish, load, writing
from nas_kd.training.augment import Augmentation
from nas_kd.training.images import AugmentedImages, Batch, Images
from nas_kd.training.loop import predict_logits

MAX_BYTES = 16 << 30  # of one cache; larger data wants `OnlineViews`
_CHUNK = 1024  # images augmented and shown to the teacher at once
_LARGEST = 60_000  # float16 ends at 65,504
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """Which views: `count` of them, drawn by `augmentation` and `seed`; `key` names what else they depend on, such as
    the digests of the data and of the teacher. `max_bytes` bounds the cache on disk."""

    count: int
    augmentation: Augmentation
    seed: int = 0
    key: str = ""
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(f"count must be at least 1 view, got {self.count}")


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """V augmented views of N images: `pixels` V×N×C×H×W uint8, `labels` N int64, the teacher's `logits` V×N×K float16
    (None without a teacher). Memory-mapped from `folder` and shared by every process that opens them."""

    pixels: Tensor
    labels: Tensor
    logits: Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def count(self) -> int:
        """The number of views."""
        return len(self.pixels)

    @property
    def bytes(self) -> int:
        """The size of pixels and logits."""
        return self.pixels.numel() + (0 if self.logits is None else 2 * self.logits.numel())

    def epoch(self, epoch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `epoch` (from 0) sees: pixels N×C×H×W uint8, labels N, logits N×K or None: the view `epoch` mod V."""
        view = epoch % self.count
        return self.pixels[view], self.labels, None if self.logits is None else self.logits[view]

    def batch(self, epoch: int, indices: Tensor) -> Batch:
        """The images `indices` (B int64) of an epoch."""
        pixels, labels, logits = self.epoch(epoch)
        indices = indices.to(labels.device)
        return Batch(pixels[indices], labels[indices], None if logits is None else logits[indices].float())

    def sample(self, count: int) -> Images:
        """The first `count` images of the first view, e.g. to recalibrate batch norms."""
        return Images(self.pixels[0, :count], self.labels[:count], self.mean, self.std)

    def to(self, device: torch.device) -> Views:
        """The same views on `device`."""
        logits = None if self.logits is None else self.logits.to(device)
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device), logits=logits)


@dataclass(frozen=True, slots=True, eq=False)
class OnlineViews:
    """Training images with fresh augmentation, and the teacher's logits computed in every step: for data that is too
    large for a cache. Costs one forward pass of the teacher per step."""

    data: AugmentedImages
    teacher: nn.Module

    def __len__(self) -> int:
        return len(self.data)

    @property
    def mean(self) -> tuple[float, ...]:
        return self.data.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.data.std

    @property
    def bytes(self) -> int:
        return self.data.bytes

    def batch(self, epoch: int, indices: Tensor) -> Batch:
        """The augmented images `indices` (B int64) of an epoch and the teacher's logits on exactly these."""
        batch = self.data.batch(epoch, indices)
        images = Images(batch.pixels, batch.labels, self.mean, self.std)
        return replace(batch, logits=predict_logits(self.teacher, images, batch_size=len(indices)))

    def sample(self, count: int) -> Images:
        """The first `count` images as epoch 0 sees them."""
        return self.data.sample(count)

    def to(self, device: torch.device) -> OnlineViews:
        """The same images on `device`; the teacher stays where it is."""
        return replace(self, data=self.data.to(device))


def build_views(
    train: Images,
    teacher: nn.Module | None,
    spec: ViewSpec,
    folder: Path,
    report: Callable[[str], None] = lambda words: None,
) -> Views:
    """The views of `train` that `spec` describes, from `folder` if they were built before, by any process.

    The teacher is asked in eval mode on its own device. Its logits are kept in float16 (rounded by less than 0.05 %).
    `report` is called after each view that is made. A damaged cache is built again with a warning. Raises DataError
    when it would need more than `max_bytes` or than the disk has, TrainingError when the teacher's logits are not
    finite.
    """
    path = folder / f"views-{_digest(train, teacher, spec)[:16]}"
    loaded = load(path)
    if loaded is None:
        _build(train, teacher, spec, path, report)
        loaded = load(path)
        if loaded is None:
            raise DataError(f"the views in {path} were damaged while they were written: check the disk")
    return _views(path, loaded[0], train.labels, train.mean, train.std)


def open_views(path: Path, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Views | None:
    """The views that `build_views` left in a folder, of images with these labels (N); None when they are not there or
    damaged."""
    loaded = load(path)
    return None if loaded is None else _views(path, loaded[0], labels, mean, std)


def _views(
    path: Path, arrays: Mapping[str, Array], labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Views:
    logits = torch.from_numpy(arrays["logits"]) if "logits" in arrays else None
    return Views(torch.from_numpy(arrays["pixels"]), labels, logits, mean, std, path)


def views_bytes(train: Images, spec: ViewSpec, classes: int) -> int:
    """What the views of `train` take on disk, with a teacher's logits over so many classes."""
    return spec.count * (train.bytes + 2 * classes * len(train))


def _build(train: Images, teacher: nn.Module | None, spec: ViewSpec, path: Path, report: Callable[[str], None]) -> None:
    classes = 0 if teacher is None else predict_logits(teacher, train[:2]).shape[1]
    count, needed = len(train), views_bytes(train, spec, classes)
    if needed > spec.max_bytes:
        raise DataError(
            f"{spec.count} views of {count} images need {needed / 2**30:.1f} GiB, the limit is "
            f"{spec.max_bytes / 2**30:.1f} GiB: use fewer views, fewer or smaller images, or a higher limit"
        )
    _logger.info("building %d views of %d images (%.0f MiB)", spec.count, count, needed / 2**20)
    with writing(path, needed) as draft:
        files = {"pixels": ArrayFile(draft / "pixels.npy", (spec.count, *train.pixels.shape), "|u1")}
        if teacher is not None:
            files["logits"] = ArrayFile(draft / "logits.npy", (spec.count, count, classes), "<f2")
        with ExitStack() as stack:
            for file in files.values():
                stack.enter_context(file)
            made = 0
            for images in _augmented(train, spec):
                files["pixels"].write(images.pixels.numpy())
                if teacher is not None:
                    files["logits"].write(_half(predict_logits(teacher, images)))
                made += len(images)
                if made % count == 0:
                    report(f"{made // count} of {spec.count} views of {count} images")
        finish(draft, files)


def _augmented(train: Images, spec: ViewSpec) -> Iterator[Images]:
    """The same images that training on `AugmentedImages` with this seed sees in its first epochs, in chunks."""
    data = AugmentedImages(train, spec.augmentation, spec.seed)
    for view in range(spec.count):
        for indices in torch.split(torch.arange(len(train)), _CHUNK):
            batch = data.batch(view, indices)
            yield Images(batch.pixels.cpu(), batch.labels.cpu(), train.mean, train.std)


def _half(logits: Tensor) -> Array:
    largest = logits.abs().max().item()
    if not largest < _LARGEST:  # NaN too
        raise TrainingError(f"the teacher gives logits up to {largest:g}: its weights or its normalisation are broken")
    return logits.half().numpy()


def _digest(train: Images, teacher: nn.Module | None, spec: ViewSpec) -> str:
    digest = hashlib.sha256(f"1 {spec.count} {spec.augmentation} {spec.seed} {spec.key}".encode())
    digest.update(np.ascontiguousarray(train.pixels.cpu().numpy()).data)
    if teacher is not None:
        digest.update(f"{train.mean} {train.std} {weights_digest(teacher)}".encode())
    return digest.hexdigest()


def weights_digest(network: nn.Module) -> str:
    """The SHA-256 (hex) of a network's structure and of every parameter and buffer."""
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
