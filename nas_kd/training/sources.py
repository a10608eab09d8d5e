"""Where images come from before they are cut and decoded: scikit-learn's digits or timm's dataset factory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nas_kd.errors import DataError
from nas_kd.training.arrays import Array
from nas_kd.training.dataset_names import DIGITS, FOLDER, check_name, choose_dataset

_logger = logging.getLogger(__name__)
_TRAIN_FOLDERS = ("train", "training")
_TEST_FOLDERS = ("test", "val", "valid", "validation", "eval", "evaluation")  # the first that is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A dataset that is not decoded yet.

    Labels are known at once (int64); `train_image(i)` and `test_image(i)` open one image and raise DataError, naming
    the file, when it cannot be read. Without a test split `test_labels` is None. `fingerprint` changes with the files.
    """

    name: str
    class_names: tuple[str, ...]
    train_labels: Array
    test_labels: Array | None
    train_image: Callable[[int], Image.Image]
    test_image: Callable[[int], Image.Image]
    fingerprint: str


def open_source(dataset: str | None, data_dir: str | None) -> Source:
    """Finds the images and their labels, decoding nothing; without a name, image folders in `data_dir` or the digits.

    Raises DataError for a missing folder, no images, or a folder that the dataset would not read.
    """
    name = choose_dataset(dataset, data_dir)
    check_name(name)
    if name == DIGITS:
        return _digits()
    if data_dir is None:
        raise DataError(f"the dataset {name!r} is read from disk: give its folder with --data-dir")
    root = Path(data_dir)
    if root.suffix == ".tar":
        raise DataError(f"{root} is an archive: unpack it and give the folder")
    if not root.is_dir():
        raise DataError(f"there is no data folder {root}: give one that exists with --data-dir")
    return _folders(root) if name == FOLDER else _torchvision(name, root)


def _digits() -> Source:
    from sklearn.datasets import load_digits  # a second to import, and only for this dataset

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    return Source(
        name="the handwritten digits",
        class_names=tuple(str(name) for name in digits.target_names),
        train_labels=digits.target.astype(np.int64),
        test_labels=None,
        train_image=lambda index: Image.fromarray(pixels[index]),
        test_image=_no_image,
        fingerprint=_hash_of(pixels.tobytes(), digits.target.tobytes()),
    )


def _folders(root: Path) -> Source:
    """Image folders through timm's own reader: class names are the names of the folders that hold images."""
    train_root = _first_folder(root, _TRAIN_FOLDERS)
    test_root = _first_folder(root, _TEST_FOLDERS)
    if train_root is None and test_root is not None:
        raise DataError(f"{root} has a folder {test_root.name!r} but none of {', '.join(_TRAIN_FOLDERS)}")
    train = _reader(train_root or root)
    test = _reader(test_root, train.class_to_idx) if test_root is not None else None
    classes = tuple(sorted(train.class_to_idx, key=train.class_to_idx.__getitem__))
    readers = [reader for reader in (train, test) if reader is not None]
    return Source(
        name=str(root),
        class_names=classes,
        train_labels=_labels([target for _, target in train.samples]),
        test_labels=None if test is None else _labels([target for _, target in test.samples]),
        train_image=partial(_open_file, train.samples),
        test_image=_no_image if test is None else partial(_open_file, test.samples),
        fingerprint=_hash_of(*(_listing(reader.samples, root) for reader in readers)),
    )


def _reader(folder: Path, class_to_idx: dict[str, int] | None = None) -> Any:
    from timm.data import create_dataset

    try:
        reader = create_dataset("", str(folder), search_split=False).reader
    except RuntimeError as error:  # timm: "Found 0 images in subfolders of ..."
        raise DataError(f"no images (.png, .jpg, .jpeg) in {folder}: put them into one folder per class") from error
    if class_to_idx is None:
        _tell_empty(folder, reader.samples)
        return reader
    if unknown := sorted(set(reader.class_to_idx) - set(class_to_idx)):
        raise DataError(f"the class {unknown[0]!r} has images in {folder} but no images in train")
    # by name: a class without test images must not move the numbers of the others
    return create_dataset("", str(folder), search_split=False, class_map=class_to_idx).reader


def _tell_empty(folder: Path, samples: list[tuple[str, int]]) -> None:
    """Warns of folders that look like classes and hold no image: they are none."""
    filled = {Path(file).relative_to(folder).parts[0] for file, _ in samples}
    named = (part.name for part in sorted(folder.iterdir()) if part.is_dir() and not part.name.startswith((".", "__")))
    for name in named:
        if name not in filled:
            _logger.warning("the folder %r of %s holds no images: it is no class", name, folder)


def _torchvision(dataset: str, root: Path) -> Source:
    train, test = (_create(dataset, root, split) for split in ("train", "validation"))
    names = getattr(train, "classes", None)
    labels = _targets(train)
    classes = tuple(_class_name(name) for name in names) if names else tuple(map(str, range(int(labels.max()) + 1)))
    return Source(
        name=dataset,
        class_names=classes,
        train_labels=labels,
        test_labels=_targets(test),
        train_image=partial(_open_item, train),
        test_image=partial(_open_item, test),
        fingerprint=_hash_of(dataset.encode(), *(_content(part, root) for part in (train, test))),
    )


def _create(dataset: str, root: Path, split: str) -> Any:
    from timm.data import create_dataset

    try:
        return create_dataset(dataset, str(root), split=split, download=False)
    except (RuntimeError, OSError, AssertionError, ValueError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{dataset} is not in {root} as torchvision lays it out (nothing is downloaded): {reason}"
        ) from error


def _targets(dataset: Any) -> Array:
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            targets = np.asarray(getattr(dataset, name))
            return _labels(targets[:, 0] if targets.ndim == 2 else targets)  # QMNIST keeps more columns
    if hasattr(dataset, "imgs"):
        return _labels([target for _, target in dataset.imgs])
    return _labels([dataset[index][1] for index in range(len(dataset))])


def _class_name(name: Any) -> str:
    return str(name[0]) if isinstance(name, tuple) else str(name)  # ImageNet lists synonyms


def _labels(values: Any) -> Array:
    return np.asarray(values, dtype=np.int64)


def _content(dataset: Any, root: Path) -> bytes:
    data = getattr(dataset, "data", None)
    if data is not None:
        return hashlib.sha256(np.ascontiguousarray(data).tobytes() + _targets(dataset).tobytes()).digest()
    samples = getattr(dataset, "imgs", None) or getattr(dataset, "samples", None)
    return _listing(samples, root) if samples else repr(dataset).encode()


def _listing(samples: list[tuple[str, int]], root: Path) -> bytes:
    lines = []
    for file, label in samples:
        about = Path(file).stat()
        lines.append([str(Path(file).relative_to(root)), label, about.st_size, about.st_mtime_ns])
    return json.dumps(lines).encode()


def _open_file(samples: list[tuple[str, int]], index: int) -> Image.Image:
    # timm's own __getitem__ replaces an unreadable image by its neighbour; here the file is named instead
    path = samples[index][0]
    try:
        with Image.open(path) as image:
            return _in_eight_bits(image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"cannot read the image {path}: {error}") from error


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """A decoded image. 16-bit greys are scaled down: Pillow itself would cut everything brighter than 255 off."""
    image.load()
    if not image.mode.startswith("I"):  # I;16, and I in older versions of Pillow
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _open_item(dataset: Any, index: int) -> Image.Image:
    try:
        return _in_eight_bits(dataset[index][0])
    except Exception as error:
        samples = getattr(dataset, "imgs", None) or getattr(dataset, "samples", None)
        which = samples[index][0] if samples else f"number {index}"
        raise DataError(f"cannot read the image {which}: {error}") from error


def _no_image(index: int) -> Image.Image:
    raise DataError(f"there is no test image {index}")


def _first_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _hash_of(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
