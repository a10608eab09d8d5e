"""A dataset as three splits of decoded images: scikit-learn's digits, or what timm's dataset factory finds on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from nas_kd.errors import DataError
from nas_kd.training import sources
from nas_kd.training.arrays import Array, ArrayFile, finish, load, writing
from nas_kd.training.augment import derive_seed
from nas_kd.training.dataset_names import DIGITS, check_name, choose_dataset
from nas_kd.training.images import Images, normalise
from nas_kd.training.sources import Source

__all__ = ["DIGITS", "DataSpec", "Images", "Splits", "load_splits", "normalise"]

TEST_FRACTION = 0.2  # of a dataset that has no test split of its own
_CHUNK = 256  # images decoded at once by the workers
_PARTS = ("train", "val", "test")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Which images, and in which form.

    `dataset` is `digits` (no files needed) or a name of timm's dataset factory: `torch/cifar10`, `torch/fashion_mnist`,
    ..., '' or `folder` for the image folders in `data_dir`; by default these where a `data_dir` is given, else the
    digits. Images become `in_chans` (1 or 3) × `img_size` ×
    `img_size`; `mean` and `std` are per channel on the scale 0–1; None takes them from the training images.
    `train_images` limits the training images, balanced over the classes, and the validation images in proportion.
    `seed` decides every cut; `workers` is the number of decoding threads. Raises DataError for a value outside its
    range.
    """

    dataset: str | None = None
    data_dir: str | None = None
    img_size: int = 32
    in_chans: int = 3
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    val_fraction: float = 0.2
    train_images: int | None = None
    seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        check_name(choose_dataset(self.dataset, self.data_dir))
        if self.in_chans not in (1, 3):
            raise DataError(f"images have 1 or 3 channels, got in_chans={self.in_chans}")
        if not 0 < self.val_fraction < 1:
            raise DataError(f"val_fraction must lie in (0, 1), got {self.val_fraction!r}")
        for name, least in (("img_size", 1), ("num_classes", 2), ("train_images", 1), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"{name} must be at least {least}, got {value}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, self.in_chans):
                raise DataError(f"{name} needs 1 or {self.in_chans} values, got {len(values)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The images to train on, to select on and (once) to test on. `digest` names their content, form and cut; `folder`
    is where they are cached, if they are."""

    train: Images
    val: Images
    test: Images
    class_names: tuple[str, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class _Cut:
    """Which images of the source go where, and the labels of all of them."""

    train: Array
    val: Array
    test: Array


def load_splits(spec: DataSpec, cache_dir: Path) -> Splits:
    """Reads, cuts, decodes and caches the dataset; the second time it is memory-mapped from `cache_dir`.

    Validation is cut from the training split by seed, class by class. Both come in an order in which the first images,
    however many, hold the classes in equal parts. Test is the dataset's own test (or else
    validation) split; where there is none it is cut by seed too, and a log line says so. Nothing is downloaded.
    Raises DataError for everything that is wrong with the data, before any image is decoded where that is possible,
    and OutputError when the cache cannot be written.
    """
    source = sources.open_source(spec.dataset, spec.data_dir)
    _check_classes(source, spec)
    key = _digest(spec, source)
    folder = cache_dir / f"images-{key[:16]}"
    loaded = load(folder)
    if loaded is None:
        _decode_all(source, _cut(source, spec), spec, folder)
        loaded = load(folder)
        if loaded is None:
            raise DataError(f"the images in {folder} were damaged while they were written: check the disk")
    arrays, extra = loaded
    return _splits(arrays, extra, spec, source, folder)


def _splits(arrays: dict[str, Array], extra: dict[str, Any], spec: DataSpec, source: Source, folder: Path) -> Splits:
    mean = _per_channel(spec.mean if spec.mean is not None else tuple(extra["mean"]), spec.in_chans)
    std = _per_channel(spec.std if spec.std is not None else tuple(extra["std"]), spec.in_chans)
    parts = {
        part: Images(torch.from_numpy(arrays[f"{part}_pixels"]), torch.from_numpy(arrays[f"{part}_labels"]), mean, std)
        for part in _PARTS
    }
    digest = hashlib.sha256(json.dumps([_digest(spec, source), mean, std]).encode()).hexdigest()[:16]
    num_classes = spec.num_classes or len(source.class_names)
    names = source.class_names
    return Splits(
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        class_names=names,
        num_classes=num_classes,
        mean=mean,
        std=std,
        digest=digest,
        folder=folder,
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values


def _digest(spec: DataSpec, source: Source) -> str:
    # neither the folder's place nor the number of workers changes the images
    form = [spec.img_size, spec.in_chans, spec.val_fraction, spec.train_images, spec.seed, TEST_FRACTION]
    return hashlib.sha256(json.dumps([2, source.fingerprint, form]).encode()).hexdigest()


def _check_classes(source: Source, spec: DataSpec) -> None:
    classes, known = len(source.class_names), spec.num_classes
    if known is not None and known < classes:
        raise DataError(f"{source.name} has {classes} classes, --num-classes is {known}: raise it or leave it out")
    for part, labels in (("train", source.train_labels), ("test", source.test_labels)):
        if labels is not None and (labels.min() < 0 or labels.max() >= classes):
            raise DataError(
                f"{source.name} has the label {labels.min() if labels.min() < 0 else labels.max()} in {part}, "
                f"but only the classes 0–{classes - 1}"
            )
    if spec.train_images is not None and spec.train_images < classes:
        raise DataError(f"{spec.train_images} training images are too few for {classes} classes: raise train_images")
    counts = np.bincount(source.train_labels, minlength=classes)
    least = 2 if source.test_labels is not None else 3
    rare = int(counts.argmin())
    if counts[rare] == 0:
        raise DataError(f"the class {source.class_names[rare]!r} of {source.name} has no images in train")
    if counts[rare] < least:
        raise DataError(
            f"the class {source.class_names[rare]!r} of {source.name} has {counts[rare]} training images, at least "
            f"{least} are needed to cut the splits"
        )


def _cut(source: Source, spec: DataSpec) -> _Cut:
    """Indices into the source: train and val (and test where there is none) come from its training images."""
    labels = source.train_labels
    pool = np.arange(len(labels))
    test = np.arange(len(source.test_labels)) if source.test_labels is not None else None
    if test is None:
        _logger.info("%s has no test split: %.0f%% of it is cut off by seed", source.name, 100 * TEST_FRACTION)
        pool, test = _split(pool, labels, TEST_FRACTION, derive_seed(spec.seed, "test"))
    pool, val = _split(pool, labels, spec.val_fraction, derive_seed(spec.seed, "val"))
    if spec.train_images is not None and spec.train_images < len(pool):
        val_images = max(round(spec.train_images / len(pool) * len(val)), len(source.class_names))
        pool = _balanced(pool, labels, spec.train_images, derive_seed(spec.seed, "limit train"))
        val = _balanced(val, labels, val_images, derive_seed(spec.seed, "limit val"))
    # files come sorted by class, but a trial or a calibration takes the first images: any prefix must hold all classes
    train = _balanced(np.sort(pool), labels, len(pool), derive_seed(spec.seed, "order train"))
    return _Cut(train, _balanced(np.sort(val), labels, len(val), derive_seed(spec.seed, "order val")), test)


def _split(pool: Array, labels: Array, fraction: float, seed: int) -> tuple[Array, Array]:
    """Cuts `fraction` of every class off, at least one image and never all; (what stays, what is cut off)."""
    generator = np.random.default_rng(seed)
    stays, cut = [], []
    for label in np.unique(labels[pool]):
        members = generator.permutation(pool[labels[pool] == label])
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        cut.append(members[:count])
        stays.append(members[count:])
    return np.concatenate(stays), np.concatenate(cut)


def _balanced(pool: Array, labels: Array, count: int, seed: int) -> Array:
    """`count` of the pool, (nearly) equally many of each class: every class's first image, every second one, ..."""
    shuffled = np.random.default_rng(seed).permutation(pool)
    rank = np.zeros(len(shuffled), dtype=np.int64)
    for label in np.unique(labels[shuffled]):
        members = labels[shuffled] == label
        rank[members] = np.arange(members.sum())
    return shuffled[np.lexsort((labels[shuffled], rank))][:count]


def _decode_all(source: Source, cut: _Cut, spec: DataSpec, folder: Path) -> None:
    counts = {part: len(getattr(cut, part)) for part in _PARTS}
    row = (spec.in_chans, spec.img_size, spec.img_size)
    needed = sum(counts.values()) * (int(np.prod(row)) + 8)
    _logger.info("decoding %d images of %s to %d×%d×%d", sum(counts.values()), source.name, *row)
    with writing(folder, needed) as draft:
        files, moments = {}, _Moments(spec.in_chans)
        for part in _PARTS:
            labels, open_image = source.train_labels, source.train_image
            if part == "test" and source.test_labels is not None:
                labels, open_image = source.test_labels, source.test_image
            indices = getattr(cut, part)
            files[f"{part}_labels"] = _write(draft / f"{part}_labels.npy", (len(indices),), "<i8", [labels[indices]])
            pieces = _decoded(open_image, indices, spec)
            watched = map(moments.see, pieces) if part == "train" else pieces
            files[f"{part}_pixels"] = _write(draft / f"{part}_pixels.npy", (len(indices), *row), "|u1", watched)
        finish(draft, files, moments.summary())


def _write(path: Path, shape: tuple[int, ...], dtype: str, pieces: Iterator[Array] | Sequence[Array]) -> ArrayFile:
    with ArrayFile(path, shape, dtype) as file:
        for piece in pieces:
            file.write(piece)
    return file


def _decoded(open_image: Callable[[int], Image.Image], indices: Array, spec: DataSpec) -> Iterator[Array]:
    """Pieces n×C×H×W uint8, decoded by threads (Pillow releases the interpreter while it works)."""

    def decode(index: int) -> Array:
        image = open_image(index).convert("L" if spec.in_chans == 1 else "RGB")
        if image.size != (spec.img_size, spec.img_size):
            image = ImageOps.fit(image, (spec.img_size, spec.img_size), method=Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return pixels[None] if spec.in_chans == 1 else pixels.transpose(2, 0, 1)

    rest = iter(indices.tolist())
    with ThreadPoolExecutor(spec.workers) as pool:
        while chunk := list(islice(rest, _CHUNK)):
            yield np.stack(list(pool.map(decode, chunk)))


class _Moments:
    """Mean and standard deviation of every channel, gathered while images pass by; scale 0–1."""

    def __init__(self, channels: int) -> None:
        self.count, self.sum, self.squares = 0, np.zeros(channels), np.zeros(channels)

    def see(self, pixels: Array) -> Array:
        """Counts the images N×C×H×W in and passes them on."""
        values = pixels.astype(np.float64) / 255
        self.count += values.size // values.shape[1]
        self.sum += values.sum(axis=(0, 2, 3))
        self.squares += (values**2).sum(axis=(0, 2, 3))
        return pixels

    def summary(self) -> dict[str, list[float]]:
        """The `mean` and `std` of each channel; a channel that never changes gets the std 1."""
        mean = self.sum / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        return {"mean": mean.round(6).tolist(), "std": np.where(std > 1e-4, std, 1.0).round(6).tolist()}
