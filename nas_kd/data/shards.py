"""WebDataset shards: tar files of images, each with its class in a .cls file beside it, read in any order.

timm's own reader goes through them in the order of a shuffle buffer; here each image has a number, as in a folder, so
that a seed means the same batches.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import operator
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nas_kd.data.folders import split_of
from nas_kd.data.pictures import open_picture, readable_suffixes
from nas_kd.errors import DataError
from nas_kd.files.arrays import Array

_INFO = ("_info.json", "info.json")  # timm's list of the shards of each split
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # WebDataset: an image's files have its name up to the first dot
_NUMBERED = re.compile(r"(.*?)(\d+)\.tar")


@dataclass(frozen=True, slots=True)
class Shards:
    """The images of one split: the tar file of each, where in it the image begins, its bytes, and its label; N each."""

    paths: tuple[str, ...]
    file: Array
    start: Array
    size: Array
    labels: Array

    def open(self, index: int) -> Image.Image:
        """An image of mode L or RGB. Raises DataError, naming the shard, when it cannot be read."""
        try:
            with open(self.paths[self.file[index]], "rb") as shard:
                shard.seek(self.start[index])
                return open_picture(io.BytesIO(shard.read(self.size[index])))
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise DataError(f"cannot read the image {self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        """Where an image is."""
        return f"at byte {self.start[index]} of {self.paths[self.file[index]]}"


def read_shards(root: Path) -> dict[str, Shards]:
    """The images of each split, `train`, `val` and `test`, in the shards of a folder; opens no image.

    Which shard is of which split says timm's `_info.json`, or else its name; without such words all are to train on.
    Raises DataError for shards that are missing, broken or without classes.
    """
    info = _read_info(root)
    splits = _listed(root, info) if info else _found(root)
    if "train" not in splits:
        raise DataError(f"the shards in {root} hold no images to train on: name some like train-0000.tar")
    return {split: _joined(paths) for split, paths in splits.items()}


def _read_info(root: Path) -> Mapping[str, Any]:
    path = next((root / name for name in _INFO if (root / name).is_file()), None)
    if path is None:
        return {}
    try:
        splits: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))["splits"]
        return {name: (about["filenames"], about.get("shard_lengths")) for name, about in splits.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read {path} as timm's list of shards: {error!r}") from error


def _listed(root: Path, info: Mapping[str, Any]) -> dict[str, list[Path]]:
    """The shards that are listed, by split. Raises DataError for one that is not there, or holds less."""
    found: dict[str, list[Path]] = {}
    for name, (files, lengths) in info.items():
        paths = [root / file for file in files]
        _check_there(root, [path.name for path in paths if not path.is_file()], len(paths))
        for path, length in zip(paths, lengths or (), strict=False):
            if len(_index(path)[0]) != length:
                raise DataError(f"{path} holds {len(_index(path)[0])} images, its list says {length}: fetch it again")
        if kind := split_of(name):
            found.setdefault(kind, []).extend(paths)
    return found


def _found(root: Path) -> dict[str, list[Path]]:
    """The shards of a folder by the split in their names. Raises DataError where their numbers have gaps."""
    paths = sorted(root.glob("*.tar"))
    if not paths:
        raise DataError(f"there are no shards (.tar) in {root}")
    numbers: dict[str, dict[int, str]] = {}
    for path in paths:
        if match := _NUMBERED.fullmatch(path.name):
            numbers.setdefault(match[1], {})[int(match[2])] = match[2]
    missing = [
        f"{stem}{number:0{len(known[max(known)])}}.tar"
        for stem, known in numbers.items()
        for number in range(min(1, *known), max(known))
        if number not in known
    ]
    _check_there(root, missing, len(paths) + len(missing))
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(split_of(path.stem) or "train", []).append(path)
    return found


def _check_there(root: Path, missing: Sequence[str], count: int) -> None:
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{len(missing)} of {count} shards are missing in {root}: {', '.join(missing[:3])}{more}")


def _joined(paths: Sequence[Path]) -> Shards:
    parts = [_index(path) for path in paths]
    file = np.repeat(np.arange(len(paths)), [len(start) for start, _, _ in parts])
    start, size, labels = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Shards(tuple(map(str, paths)), file, start, size, labels)


def _index(path: Path) -> tuple[Array, Array, Array]:
    about = path.stat()
    return _read_index(path, about.st_size, about.st_mtime_ns)


@functools.cache
def _read_index(path: Path, size: int, changed: int) -> tuple[Array, Array, Array]:
    """Where the images of a shard begin, their bytes, and their labels."""
    try:
        with tarfile.open(path, "r:") as shard:
            rows = np.array(list(_images_in(shard)), dtype=np.int64).reshape(-1, 3)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"cannot read the shard {path}: {error}; fetch it again") from error
    except LookupError as error:
        raise DataError(
            f"the image {error.args[0]} in {path} has no class: a number in a .cls file beside it"
        ) from None
    return rows[:, 0], rows[:, 1], rows[:, 2]


def _images_in(shard: tarfile.TarFile) -> Iterator[tuple[int, int, int]]:
    """Where each image begins, its bytes and its label; files of one name follow each other.

    Raises LookupError, with its name, for an image without a class.
    """
    images = readable_suffixes()
    files = ((_NAME.fullmatch(member.name), member) for member in shard if member.isfile())
    named = ((match[1], match[2].lower(), member) for match, member in files if match)
    for name, group in itertools.groupby(named, key=operator.itemgetter(0)):
        kinds = {kind: member for _, kind, member in group}
        image = next((member for kind, member in kinds.items() if f".{kind.rpartition('.')[2]}" in images), None)
        if image is not None:
            yield image.offset_data, image.size, _class_in(shard, kinds.get("cls"), name)


def _class_in(shard: tarfile.TarFile, member: tarfile.TarInfo | None, name: str) -> int:
    file = None if member is None else shard.extractfile(member)
    try:
        return int(b"" if file is None else file.read())
    except ValueError:
        raise LookupError(name) from None
