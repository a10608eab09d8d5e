"""Which images are meant, and which are to train on, to select on and to test on: decided before any is decoded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import numpy as np

from nas_kd.data.augment import derive_seed
from nas_kd.data.dataset_names import check_name, choose_dataset
from nas_kd.data.decoding import Chosen
from nas_kd.data.preprocessing import Preprocessing
from nas_kd.data.sources import Source
from nas_kd.errors import DataError
from nas_kd.files.arrays import Array

TEST_FRACTION = 0.2  # of a dataset that has no test split of its own
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Which images, and in which form.

    `dataset` is `digits` (no files needed) or a name of timm's dataset factory: `torch/cifar10`, `torch/fashion_mnist`,
    ..., '' or `folder` for the image folders in `data_dir`; by default these where a `data_dir` is given, else the
    digits. Images become `in_chans` (1 or 3) × `img_size` ×
    `img_size`; `mean` and `std` are per channel on the scale 0–1; None takes them from the training images.
    `train_images` limits the training images, balanced over the classes, and the validation images in proportion.
    `seed` decides every cut; `workers` is the number of decoding threads, `photo_workers` that of processes which
    transform photos that are in memory ahead of time (0: who wants them does). `preprocessing` says how images are
    resized and cropped. `class_map` is a file with the number of each class, `skip_unreadable` leaves out what
    cannot be read. With `originals` the training images are kept whole as well, the shorter side up to so many
    times `img_size`, less where they would take more than `originals_bytes`. What takes more than `memory` bytes
    when it is decoded is not: each image is decoded when it is looked at; None is no bound. Raises DataError for a
    value outside its range.
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
    photo_workers: int = 0
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    class_map: str | None = None
    skip_unreadable: bool = False
    originals: float | None = None
    originals_bytes: int = 2 << 30
    memory: int | None = None

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


def cut(source: Source, spec: DataSpec) -> dict[str, Chosen]:
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
