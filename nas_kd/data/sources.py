"""Where images come from before they are cut and decoded: scikit-learn's digits or timm's dataset factory."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nas_kd.data.class_maps import check_covers, read_class_map
from nas_kd.data.dataset_names import DIGITS, FOLDER, WDS, check_name, choose_dataset
from nas_kd.data.folders import read_tree
from nas_kd.data.pictures import as_seen, open_picture
from nas_kd.data.shards import read_shards
from nas_kd.errors import DataError
from nas_kd.files.arrays import Array

_logger = logging.getLogger(__name__)
_LOOKS = 15  # images whose size is looked at


@dataclass(frozen=True, slots=True)
class SourceSplit:
    """One split that is not decoded yet: its labels (int64), what opens one image (of mode L or RGB), and what an image
    is called. `open_image` raises DataError, naming the file, when it cannot be read. Processes can be given it."""

    labels: Array
    open_image: Callable[[int], Image.Image]
    called: Callable[[int], str]

    def without(self, images: Collection[int]) -> SourceSplit:
        """The same but for some images."""
        kept = np.setdiff1d(np.arange(len(self.labels)), list(images))
        return SourceSplit(self.labels[kept], partial(_nth, self.open_image, kept), partial(_nth, self.called, kept))


def _nth(of: Callable[[int], Any], kept: Array, index: int) -> Any:
    return of(int(kept[index]))


@dataclass(frozen=True, slots=True)
class _Paths:
    """Many paths in one row of bytes: as objects they would take more memory than the images that are looked at, and
    processes that share them would copy them one by one."""

    row: Array
    ends: Array

    @classmethod
    def of(cls, paths: Sequence[Path]) -> _Paths:
        names = [os.fsencode(path) for path in paths]
        return cls(np.frombuffer(b"".join(names), np.uint8), np.cumsum([0, *map(len, names)]))

    def __getitem__(self, index: int) -> Path:
        return Path(os.fsdecode(self.row[self.ends[index] : self.ends[index + 1]].tobytes()))

    def open(self, index: int) -> Image.Image:
        return _open_file(self[index])

    def name(self, index: int) -> str:
        return str(self[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A dataset that is not decoded yet. Without a validation or test split of its own `val` or `test` is None.

    `fingerprint` changes with the files; `side` is the usual shorter side of its images in pixels.
    """

    name: str
    class_names: tuple[str, ...]
    train: SourceSplit
    val: SourceSplit | None = None
    test: SourceSplit | None = None
    fingerprint: str
    side: int

    def parts(self) -> dict[str, SourceSplit]:
        """The splits that there are, by name."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in named.items() if part is not None}

    def without(self, images: Mapping[str, Collection[int]]) -> Source:
        """The same but for some images of some splits."""
        left: dict[str, Any] = {name: self.parts()[name].without(some) for name, some in images.items()}
        return replace(self, **left)

    @property
    def train_labels(self) -> Array:
        """The labels of the training images."""
        return self.train.labels

    @property
    def test_labels(self) -> Array | None:
        """The labels of the test images; None where there are none."""
        return None if self.test is None else self.test.labels


def open_source(dataset: str | None, data_dir: str | None, class_map: str | None = None) -> Source:
    """Finds the images and their labels, decoding nothing; without a name, image folders in `data_dir` or the digits.

    `class_map` is a file that says which class has which number. Raises DataError for a missing folder, no images, or
    a folder or file that the dataset would not read.
    """
    name = choose_dataset(dataset, data_dir)
    check_name(name)
    if class_map is not None and name != FOLDER:
        raise DataError(f"--class-map numbers the classes of image folders, but the dataset is {name}: leave it out")
    if name == DIGITS:
        return _digits()
    if data_dir is None:
        raise DataError(f"the dataset {name!r} is read from disk: give its folder with --data-dir")
    root = Path(data_dir)
    if root.suffix == ".tar":
        raise DataError(f"{root} is an archive: unpack it and give the folder")
    if not root.is_dir():
        raise DataError(f"there is no data folder {root}: give one that exists with --data-dir")
    if name == WDS:
        return _shards(root)
    return _folders(root, class_map) if name == FOLDER else _torchvision(name, root)


def _digits() -> Source:
    """scikit-learn's digits, out of its file: to import it, with all of SciPy's statistics, takes over a second."""
    package = Path(find_spec("sklearn").origin)  # type: ignore[union-attr, arg-type]
    rows = np.loadtxt(package.parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    labels = rows[:, -1].astype(np.int64)
    pixels = (rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return Source(
        name="the handwritten digits",
        class_names=tuple("0123456789"),
        train=SourceSplit(labels, partial(_digit, pixels), "digit {}".format),
        fingerprint=_hash_of(pixels.tobytes(), labels.tobytes()),
        side=pixels.shape[1],
    )


def _digit(pixels: Array, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def _folders(root: Path, class_map: str | None) -> Source:
    """Image folders: class names are those of the folders, in timm's order or that of the class map."""
    tree = read_tree(root)
    for line in tree.notes:
        _tell(line)
    numbers = {name: number for number, name in enumerate(tree.classes)}
    if class_map is not None:
        numbers = read_class_map(class_map, root)
        check_covers(numbers, tree.classes, class_map)
    parts = {"train": tree.train, "val": tree.val, "test": tree.test}
    if tree.test is None:  # one split beside the training images is the test
        parts = {"train": tree.train, "val": None, "test": tree.val}
    samples = {part: [(path, numbers[name]) for path, name in found] for part, found in parts.items() if found}
    return Source(
        name=str(root),
        class_names=tuple(sorted(numbers, key=numbers.__getitem__)),
        **{part: _file_part(found) for part, found in samples.items()},
        fingerprint=_hash_of(b"as seen", *(part.encode() + _listing(found, root) for part, found in samples.items())),
        side=_usual_side([path for path, _ in samples["train"]]),
    )


def _shards(root: Path) -> Source:
    """WebDataset shards: classes have numbers and no names."""
    splits = read_shards(root)
    parts = {name: SourceSplit(shards.labels, shards.open, shards.name) for name, shards in splits.items()}
    if "test" not in parts and "val" in parts:  # one split beside the training images is the test
        parts["test"] = parts.pop("val")
    train, files = splits["train"], [(path, name) for name, shards in splits.items() for path in shards.paths]
    looks = range(0, len(train.labels), max(1, len(train.labels) // _LOOKS))
    return Source(
        name=str(root),
        class_names=tuple(map(str, range(int(train.labels.max(initial=-1)) + 1))),
        **parts,
        fingerprint=_hash_of(json.dumps([[name, Path(path).name, *_stamp(path)] for path, name in files]).encode()),
        side=int(np.median([min(train.open(index).size) for index in looks])) if len(train.labels) else 0,
    )


@functools.cache  # once, however often the folder is read
def _tell(line: str) -> None:
    _logger.warning("%s", line)


def _file_part(samples: Sequence[tuple[Path, int]]) -> SourceSplit:
    paths = _Paths.of([path for path, _ in samples])
    return SourceSplit(_labels([label for _, label in samples]), paths.open, paths.name)


def _usual_side(paths: Sequence[Path]) -> int:
    """The median of the shorter sides of some images, of which the headers alone are read; 0 where none can be."""
    sides = []
    for path in paths[:: max(1, len(paths) // _LOOKS)]:
        with suppress(Exception), Image.open(path) as image:  # what cannot be read is named when it is decoded
            sides.append(min(image.size))
    return int(np.median(sides)) if sides else 0


def _torchvision(dataset: str, root: Path) -> Source:
    train, test = (_create(dataset, root, split) for split in ("train", "validation"))
    names = getattr(train, "classes", None)
    labels = _targets(train)
    classes = tuple(_class_name(name) for name in names) if names else tuple(map(str, range(int(labels.max()) + 1)))
    return Source(
        name=dataset,
        class_names=classes,
        train=SourceSplit(labels, partial(_open_item, train), partial(_item_name, train)),
        test=SourceSplit(_targets(test), partial(_open_item, test), partial(_item_name, test)),
        fingerprint=_hash_of(dataset.encode(), *(_content(part, root) for part in (train, test))),
        side=min(_open_item(train, 0).size),
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


def _listing(samples: Sequence[tuple[str | Path, int]], root: Path) -> bytes:
    lines = []
    for file, label in samples:
        lines.append([str(Path(file).relative_to(root)), label, *_stamp(file)])
    return json.dumps(lines).encode()


def _stamp(file: str | Path) -> tuple[int, int]:
    about = Path(file).stat()
    return about.st_size, about.st_mtime_ns


def _open_file(path: Path) -> Image.Image:
    # timm's own __getitem__ replaces an unreadable image by its neighbour; here the file is named instead
    try:
        return open_picture(path)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"cannot read the image {path}: {error}") from error


def _open_item(dataset: Any, index: int) -> Image.Image:
    try:
        return as_seen(dataset[index][0])
    except Exception as error:
        raise DataError(f"cannot read the image {_item_name(dataset, index)}: {error}") from error


def _item_name(dataset: Any, index: int) -> str:
    samples = getattr(dataset, "imgs", None) or getattr(dataset, "samples", None)
    return str(samples[index][0]) if samples else f"number {index}"


def _hash_of(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
