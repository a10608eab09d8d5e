"""A dataset as three splits of decoded images: scikit-learn's digits, or what timm's dataset factory finds on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas_kd.errors import DataError
from nas_kd.training import sources
from nas_kd.training.arrays import Array, load
from nas_kd.training.augment import derive_seed
from nas_kd.training.dataset_names import DIGITS, check_name, choose_dataset
from nas_kd.training.decoding import Chosen, Form, UnreadableError, decode
from nas_kd.training.images import Images, normalise
from nas_kd.training.originals import Originals, open_originals, original_side
from nas_kd.training.preprocessing import Preprocessing
from nas_kd.training.sources import Source

__all__ = ["DIGITS", "DataSpec", "Images", "Splits", "load_splits", "normalise"]

TEST_FRACTION = 0.2  # of a dataset that has no test split of its own
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
    `seed` decides every cut; `workers` is the number of decoding threads. `preprocessing` says how images are resized
    and cropped. `class_map` is a file with the number of each class, `skip_unreadable` leaves out what cannot be read.
    With `originals` the training images are kept whole as well, the shorter side up to so many times `img_size`, less
    where they would take more than `originals_bytes`. Raises DataError for a value outside its range.
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
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    class_map: str | None = None
    skip_unreadable: bool = False
    originals: float | None = None
    originals_bytes: int = 2 << 30

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
        if self.originals is not None and not self.originals >= 1:
            raise DataError(f"originals must be at least 1 times the size, got {self.originals!r}")
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
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    @property
    def originals(self) -> Originals | None:
        """The training images before they were cropped and resized, in the same order, where they are kept."""
        return self.train.originals


def load_splits(spec: DataSpec, cache_dir: Path) -> Splits:
    """Reads, cuts, decodes and caches the dataset; the second time it is memory-mapped from `cache_dir`.

    Where the dataset has both, its validation split is what is selected on and its test split the test; where it has
    one of them, that is the test, and a log line says so where it has none: then validation and test are cut from the
    training split by seed, class by class. Training and validation images come in an order in which the first images,
    however many, hold the classes in equal parts. Nothing is downloaded.
    Raises DataError for everything that is wrong with the data, before any image is decoded where that is possible,
    and OutputError when the cache cannot be written.
    """
    source = sources.open_source(spec.dataset, spec.data_dir, spec.class_map)
    check_source(source, spec)
    key = _digest(spec, source)
    folder = cache_dir / f"images-{key[:16]}"
    loaded = load(folder)
    if loaded is None:
        _decode(source, spec, folder)
        loaded = load(folder)
        if loaded is None:
            raise DataError(f"the images in {folder} were damaged while they were written: check the disk")
    arrays, extra = loaded
    for note in extra.get("notes", ()):
        _logger.warning("%s", note)
    return _splits(arrays, extra, spec, source, folder)


def _decode(source: Source, spec: DataSpec, folder: Path) -> None:
    """Decodes the dataset, without what cannot be read if the spec says so."""
    skipped: list[str] = []
    while True:
        chosen = _cut(source, spec)
        side, remarks = _originals_side(spec, len(chosen["train"].indices), folder.parent)
        form = Form(
            size=spec.img_size,
            channels=spec.in_chans,
            preprocessing=spec.preprocessing,
            workers=spec.workers,
            original_side=side,
        )
        try:
            return decode(chosen, form, source.class_names, folder, [*_about(skipped, source), *remarks])
        except UnreadableError as error:
            if not spec.skip_unreadable:
                raise error.explain(folder.parent) from error
            skipped += [reason for part in error.failures.values() for reason in part.values()]
            source = source.without(error.failures)
            check_source(source, spec)


def _originals_side(spec: DataSpec, count: int, cache_dir: Path) -> tuple[int | None, list[str]]:
    """The shorter side of the originals of `count` training images, None for none, and a line where they are wanted but
    would take too much of the disk."""
    if spec.originals is None:
        return None, []
    there = next(folder for folder in (cache_dir.absolute(), *cache_dir.absolute().parents) if folder.exists())
    most = min(spec.originals_bytes, shutil.disk_usage(there).free // 2)
    side = original_side(spec.img_size, spec.originals, (count, spec.in_chans), most)
    if side is not None:
        return side, []
    return None, [
        f"crops are cut from the training images at {spec.img_size} pixels, not from their originals, which would take "
        f"more than {most / 2**30:.1f} GiB of the disk"
    ]


def _about(skipped: Sequence[str], source: Source) -> list[str]:
    return [f"{len(skipped)} images of {source.name} are left out: {skipped[0]}, …"] if skipped else []


def _splits(arrays: dict[str, Array], extra: dict[str, Any], spec: DataSpec, source: Source, folder: Path) -> Splits:
    mean = _per_channel(spec.mean if spec.mean is not None else tuple(extra["mean"]), spec.in_chans)
    std = _per_channel(spec.std if spec.std is not None else tuple(extra["std"]), spec.in_chans)
    parts = {
        part: Images(torch.from_numpy(arrays[f"{part}_pixels"]), torch.from_numpy(arrays[f"{part}_labels"]), mean, std)
        for part in _PARTS
    }
    digest = hashlib.sha256(json.dumps([_digest(spec, source), mean, std]).encode()).hexdigest()[:16]
    return Splits(
        train=replace(parts["train"], originals=open_originals(arrays, spec.in_chans)),
        val=parts["val"],
        test=parts["test"],
        class_names=source.class_names,
        num_classes=spec.num_classes or len(source.class_names),
        mean=mean,
        std=std,
        digest=digest,
        folder=folder,
        preprocessing=spec.preprocessing,
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values


def _digest(spec: DataSpec, source: Source) -> str:
    # neither the folder's place nor the number of workers changes the images
    form: list[Any] = [spec.img_size, spec.in_chans, spec.val_fraction, spec.train_images, spec.seed, TEST_FRACTION]
    if spec.preprocessing != Preprocessing():  # only then: images that were cached before keep their key
        form.append(asdict(spec.preprocessing))
    if spec.originals is not None:
        form.append(["originals", spec.originals, spec.originals_bytes])
    if spec.skip_unreadable:
        form.append("skip")
    return hashlib.sha256(json.dumps([2, source.fingerprint, form]).encode()).hexdigest()


def check_source(source: Source, spec: DataSpec) -> None:
    """Raises DataError for whatever is wrong with labels and classes; decodes nothing."""
    classes, known = len(source.class_names), spec.num_classes
    if classes < 2:
        raise DataError(f"{source.name} has {classes} class: there is nothing to tell apart")
    if known is not None and known < classes:
        raise DataError(f"{source.name} has {classes} classes, --num-classes is {known}: raise it or leave it out")
    for name, part in source.parts().items():
        if len(part.labels) == 0:
            raise DataError(f"{source.name} has no images left in {name}")
        if part.labels.min() < 0 or part.labels.max() >= classes:
            wrong = part.labels.min() if part.labels.min() < 0 else part.labels.max()
            raise DataError(f"{source.name} has the label {wrong} in {name}, but only the classes 0–{classes - 1}")
    _check_counts(source, spec)


def _check_counts(source: Source, spec: DataSpec) -> None:
    """Raises DataError when a class has too few training images to cut the splits; a class map may name classes that
    have none."""
    counts = np.bincount(source.train.labels, minlength=len(source.class_names))
    present = np.flatnonzero(counts) if spec.class_map else np.arange(len(counts))
    if spec.train_images is not None and spec.train_images < len(present):
        raise DataError(
            f"{spec.train_images} training images are too few for {len(present)} classes: raise train_images"
        )
    least = 2 if source.test is not None else 3
    rare = int(present[counts[present].argmin()])
    if counts[rare] == 0:
        raise DataError(f"the class {source.class_names[rare]!r} of {source.name} has no images in train")
    if counts[rare] < least:
        raise DataError(
            f"the class {source.class_names[rare]!r} of {source.name} has {counts[rare]} training "
            f"image{'s' if counts[rare] > 1 else ''}, at least {least} are needed to cut the splits"
        )


def _cut(source: Source, spec: DataSpec) -> dict[str, Chosen]:
    """Which images go where: val and test come from the training images where the dataset has none of its own."""
    labels = source.train.labels
    pool = np.arange(len(labels))
    own = {name: part for name, part in (("val", source.val), ("test", source.test)) if part is not None}
    chosen = {name: Chosen(part=part, origin=name, indices=np.arange(len(part.labels))) for name, part in own.items()}
    if "test" not in chosen:
        _logger.info("%s has no test split: %.0f%% of it is cut off by seed", source.name, 100 * TEST_FRACTION)
        pool, test = _split(pool, labels, TEST_FRACTION, derive_seed(spec.seed, "test"))
        chosen["test"] = Chosen(part=source.train, origin="train", indices=test)
    if "val" not in chosen:
        pool, val = _split(pool, labels, spec.val_fraction, derive_seed(spec.seed, "val"))
        chosen["val"] = Chosen(part=source.train, origin="train", indices=val)
    train = Chosen(part=source.train, origin="train", indices=pool)
    train, val_ = _limited(train, chosen["val"], spec) if spec.train_images else (train, chosen["val"])
    # files come sorted by class, but a trial or a calibration takes the first images: any prefix must hold all classes
    return {
        "train": _ordered(train, derive_seed(spec.seed, "order train")),
        "val": _ordered(val_, derive_seed(spec.seed, "order val")),
        "test": chosen["test"],
    }


def _limited(train: Chosen, val: Chosen, spec: DataSpec) -> tuple[Chosen, Chosen]:
    """At most so many training images, balanced over the classes, and validation images in proportion."""
    limit, count = spec.train_images, len(train.indices)
    if limit is None or limit >= count:
        return train, val
    classes = len(np.unique(train.labels))
    val_images = max(round(limit / count * len(val.indices)), classes)
    kept = _balanced(train.indices, train.part.labels, limit, derive_seed(spec.seed, "limit train"))
    kept_val = _balanced(val.indices, val.part.labels, val_images, derive_seed(spec.seed, "limit val"))
    return replace(train, indices=kept), replace(val, indices=kept_val)


def _ordered(chosen: Chosen, seed: int) -> Chosen:
    indices = np.sort(chosen.indices)
    return replace(chosen, indices=_balanced(indices, chosen.part.labels, len(indices), seed))


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
