"""The distillation cache: augmented views of the training images and the teacher's logits on them, computed once."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nas_kd.data.augment import AnyAugmentation, Augmentation
from nas_kd.data.images import AugmentedImages, Batch, Images
from nas_kd.data.memory import give_back
from nas_kd.data.mixing import Mixing
from nas_kd.errors import DataError, TrainingError
from nas_kd.files.arrays import Array, ArrayFile, finish, load_arrays, writing
from nas_kd.training.evaluation import CALIBRATION, predict_logits

MAX_BYTES = 16 << 30  # of one cache; larger data wants `OnlineViews`
_CHUNK = 1024  # images augmented and shown to the teacher at once
_LARGEST = 60_000  # float16 ends at 65,504
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """Which views: `count` of them, drawn by `augmentation`, `mixing` and `seed`; `key` names what else they depend on,
    such as the digests of the data and of the teacher. `max_bytes` bounds the cache on disk."""

    count: int
    augmentation: AnyAugmentation
    seed: int = 0
    key: str = ""
    max_bytes: int = MAX_BYTES
    mixing: Mixing | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(f"count must be at least 1 view, got {self.count}")


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """V augmented views of N images: `pixels` V×N×C×H×W uint8, `labels` N int64, the teacher's `logits` V×N×K float16
    (None without a teacher), and `shares` V×N×K float32 of the classes where images are mixed or labels smoothed. Of
    mixed images `plain` holds the first ones of the first view unmixed, as many as a calibration takes.
    Memory-mapped from `folder` and shared by every process that opens them."""

    pixels: Tensor
    labels: Tensor
    logits: Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folder: Path | None = None
    shares: Tensor | None = None
    plain: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def count(self) -> int:
        """The number of views."""
        return len(self.pixels)

    @property
    def bytes(self) -> int:
        """The size of all that is kept of them."""
        parts = (self.pixels, self.logits, self.shares, self.plain)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def epoch(self, epoch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `epoch` (from 0) sees: pixels N×C×H×W uint8, labels N, logits N×K or None: the view `epoch` mod V."""
        view = epoch % self.count
        return self.pixels[view], self.labels, None if self.logits is None else self.logits[view]

    def batch(self, epoch: int, indices: Tensor) -> Batch:
        """The images `indices` (B int64) of an epoch."""
        pixels, labels, logits = self.epoch(epoch)
        if self.shares is not None:
            labels = self.shares[epoch % self.count]
        indices = indices.to(labels.device, non_blocking=True)
        return Batch(pixels[indices], labels[indices], None if logits is None else logits[indices].float())

    def batches(self, epoch: int, order: Sequence[Tensor]) -> Iterator[Batch]:
        """The `batch` of each of these indices."""
        return (self.batch(epoch, indices) for indices in order)

    def sample(self, count: int) -> Images:
        """The first `count` images of the first view, unmixed, e.g. to recalibrate batch norms; at most 512 of images
        that are mixed."""
        pixels = (self.pixels[0] if self.plain is None else self.plain)[:count]
        return Images(pixels, self.labels[: len(pixels)], self.mean, self.std)

    def to(self, device: torch.device) -> Views:
        """The same views on `device`."""
        there = {
            name: tensor.to(device)
            for name in ("pixels", "labels", "logits", "shares", "plain")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **there)


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
        return self._taught(self.data.batch(epoch, indices))

    def batches(self, epoch: int, order: Sequence[Tensor]) -> Iterator[Batch]:
        """The `batch` of each of these indices; what streams is decoded ahead of time, the teacher is asked here."""
        return map(self._taught, self.data.batches(epoch, order))

    def _taught(self, batch: Batch) -> Batch:
        images = Images(batch.pixels, batch.classes, self.mean, self.std)
        return replace(batch, logits=predict_logits(self.teacher, images, batch_size=len(batch.labels)))

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
    loaded = load_arrays(path)
    if loaded is None:
        _build(train, teacher, spec, path, report)
        loaded = load_arrays(path)
        if loaded is None:
            raise DataError(f"the views in {path} were damaged while they were written: check the disk")
    return _views(path, loaded[0], train.labels, train.mean, train.std)


def open_views(path: Path, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Views | None:
    """The views that `build_views` left in a folder, of images with these labels (N); None when they are not there or
    damaged."""
    loaded = load_arrays(path)
    return None if loaded is None else _views(path, loaded[0], labels, mean, std)


def _views(
    path: Path, arrays: Mapping[str, Array], labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Views:
    found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Views(found["pixels"], labels, found.get("logits"), mean, std, path, found.get("shares"), found.get("plain"))


def views_bytes(train: Images, spec: ViewSpec, classes: int) -> int:
    """What the views of `train` take on disk, with a teacher's logits over so many classes."""
    whole = spec.count * (train.bytes + 2 * classes * len(train))
    if spec.mixing is None:
        return whole
    plain = min(CALIBRATION, len(train)) * train.pixels[0].numel() if spec.mixing.mixes else 0
    return whole + spec.count * 4 * spec.mixing.num_classes * len(train) + plain


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
        plain = _plain(train, spec)
        files = _files(draft, train, spec, classes, plain)
        with ExitStack() as stack:
            for file in files.values():
                stack.enter_context(file)
            if plain is not None:
                files["plain"].write(plain.cpu().numpy())
            made = 0
            for batch in _augmented(train, spec):
                files["pixels"].write(batch.pixels.cpu().numpy())
                if "shares" in files:
                    files["shares"].write(batch.labels.cpu().numpy())
                if teacher is not None:
                    images = Images(batch.pixels, batch.classes, train.mean, train.std)
                    files["logits"].write(_half(predict_logits(teacher, images)))
                made += len(batch.classes)
                give_back()
                if made % count == 0:
                    report(f"{made // count} of {spec.count} views of {count} images")
        finish(draft, files)


def _files(draft: Path, train: Images, spec: ViewSpec, classes: int, plain: Tensor | None) -> dict[str, ArrayFile]:
    """The files of views, empty; with a teacher, its logits over so many classes."""
    count = (spec.count, len(train))
    files = {"pixels": ArrayFile(draft / "pixels.npy", (spec.count, *train.pixels.shape), "|u1")}
    if classes:
        files["logits"] = ArrayFile(draft / "logits.npy", (*count, classes), "<f2")
    if spec.mixing is not None:
        files["shares"] = ArrayFile(draft / "shares.npy", (*count, spec.mixing.num_classes), "<f4")
    if plain is not None:
        files["plain"] = ArrayFile(draft / "plain.npy", tuple(plain.shape), "|u1")
    return files


def _plain(train: Images, spec: ViewSpec) -> Tensor | None:
    """What calibrates batch norms where the views are mixed: the first images as they are before that."""
    if spec.mixing is None or not spec.mixing.mixes:
        return None
    return AugmentedImages(train, spec.augmentation, spec.seed).sample(CALIBRATION).pixels


def _augmented(train: Images, spec: ViewSpec) -> Iterator[Batch]:
    """The same images that training on `AugmentedImages` with this seed sees in its first epochs, in chunks."""
    data = AugmentedImages(train, spec.augmentation, spec.seed, spec.mixing)
    each = len(train) // (2 * train.workers) if train.workers else _CHUNK  # some for every worker
    chunks = torch.split(torch.arange(len(train)), max(2, min(_CHUNK, each)))
    for view in range(spec.count):
        yield from data.batches(view, chunks)


def _half(logits: Tensor) -> Array:
    largest = logits.abs().max().item()
    if not largest < _LARGEST:  # NaN too
        raise TrainingError(f"the teacher gives logits up to {largest:g}: its weights or its normalisation are broken")
    return logits.half().numpy()


def _digest(train: Images, teacher: nn.Module | None, spec: ViewSpec) -> str:
    digest = hashlib.sha256(f"1 {spec.count} {spec.augmentation} {spec.seed} {spec.key}".encode())
    if spec.mixing is not None:
        digest.update(str(spec.mixing).encode())
    digest.update(np.ascontiguousarray(train.pixels.cpu().numpy()).data)
    if train.originals is not None and not isinstance(spec.augmentation, Augmentation):
        digest.update(np.ascontiguousarray(train.originals.sizes).data)
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
