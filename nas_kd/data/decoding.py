"""From files to arrays: every image opened, resized and cropped as timm evaluates, written once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nas_kd.data.originals import OriginalsWriter, originals_bytes, shrunk
from nas_kd.data.prefetching import wait_for
from nas_kd.data.preprocessing import Preprocessing
from nas_kd.data.sources import SourceSplit
from nas_kd.errors import DataError
from nas_kd.files.arrays import Array, ArrayFile, finish, writing

_CHUNK = 256  # images decoded at once by the workers
_SAID = 400  # chunks, after each of which it is said how far it is
_NAMED = 10  # unreadable images that are named in a line
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageForm:
    """What images become: `channels` (1 or 3) × `size` × `size`, by so many threads. Of the training images originals
    with the shorter side `original_side` are kept too, unless that is None."""

    size: int
    channels: int
    preprocessing: Preprocessing
    workers: int
    original_side: int | None = None

    @property
    def row(self) -> tuple[int, int, int]:
        """C, H, W of an image."""
        return self.channels, self.size, self.size

    @property
    def bytes(self) -> int:
        """What the pixels of an image take."""
        return self.channels * self.size**2

    def open(self, part: SourceSplit, index: int) -> Image.Image:
        """An image of a part of the source as it is, in as many colours. Raises DataError when it cannot be read."""
        return part.open_image(index).convert("L" if self.channels == 1 else "RGB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The images of one split: which ones of which part of the source, named by `origin`."""

    part: SourceSplit
    origin: str
    indices: Array

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Array:
        """Their labels."""
        return self.part.labels[self.indices]


class UnreadableError(Exception):
    """Images that cannot be read: by part of the source, number and why."""

    def __init__(self, failures: Mapping[str, Mapping[int, str]]) -> None:
        super().__init__(failures)
        self.failures = failures

    def explain(self, cache_dir: Path) -> DataError:
        """One line about all of them; where they are many, the whole list is written to a file."""
        reasons = [reason for part in self.failures.values() for reason in part.values()]
        how = "mend or remove them, or go on without by --skip-unreadable"
        if len(reasons) == 1:
            return DataError(f"{reasons[0]}; {how.replace('them', 'it')}")
        shown = "; ".join(reason.removeprefix("cannot read the image ") for reason in reasons[:_NAMED])
        if len(reasons) > _NAMED:
            file = cache_dir / "unreadable.txt"
            file.write_text("\n".join(reasons) + "\n", encoding="utf-8")
            shown += f"; and {len(reasons) - _NAMED} more, all of them in {file}"
        return DataError(f"cannot read {len(reasons)} images: {shown}; {how}")


def decode(
    chosen: Mapping[str, Chosen], form: ImageForm, class_names: Sequence[str], folder: Path, notes: list[str]
) -> None:
    """Decodes the images of every split into `folder`, with their mean and std; `notes` are kept beside them.

    Raises UnreadableError, after all were tried, when some cannot be read: then nothing is written.
    """
    count = sum(len(split.indices) for split in chosen.values())
    _logger.info("decoding %d images to %d×%d×%d", count, *form.row)
    with writing(folder, decoded_bytes(chosen, form)) as draft:
        watch = _Watch(form.channels)
        files: dict[str, ArrayFile] = {}
        for name, split in chosen.items():
            files |= _decode_split(name, split, form, draft, watch)
        if watch.failures:
            raise UnreadableError(watch.failures)
        notes = [*notes, *watch.remarks(class_names)]
        finish(draft, files, {**watch.moments(), "notes": notes})


def decoded_bytes(chosen: Mapping[str, Chosen], form: ImageForm) -> int:
    """What the images of every split take when they are decoded, with the originals of those to train on."""
    pixels = sum(len(split.indices) for split in chosen.values()) * (form.bytes + 8)
    if form.original_side is None:
        return pixels
    return pixels + originals_bytes(len(chosen["train"].indices), form.channels, form.original_side)


def look_through(
    chosen: Mapping[str, Chosen], form: ImageForm, class_names: Sequence[str], folder: Path, extra: Mapping[str, Any]
) -> None:
    """Decodes the images of every split as `decode` does and keeps nothing but what it says of them, and `extra`.

    Raises UnreadableError, after all were tried, when some cannot be read.
    """
    _logger.info("looking through %d images, which stay where they are", sum(map(len, chosen.values())))
    watch = _Watch(form.channels)
    for name, split in chosen.items():
        for number, chunk in enumerate(_decoded(split, form, watch, keep=False), 1):
            watch.see(name, split, np.stack([pixels for pixels, _ in chunk]))
            if number % _SAID == 0:
                _logger.info("%d of %d images of %s", number * _CHUNK, len(split), name)
    if watch.failures:
        raise UnreadableError(watch.failures)
    notes = [*extra.get("notes", ()), *watch.remarks(class_names)]
    with writing(folder, 0) as draft:
        finish(draft, {}, {**extra, **watch.moments(), "notes": notes})


def _decode_split(name: str, split: Chosen, form: ImageForm, draft: Path, watch: _Watch) -> dict[str, ArrayFile]:
    keeps = name == "train" and form.original_side is not None
    with ArrayFile(draft / f"{name}_labels.npy", (len(split.indices),), "<i8") as labels, ExitStack() as stack:
        labels.write(split.labels)
        pixels = stack.enter_context(ArrayFile(draft / f"{name}_pixels.npy", (len(split.indices), *form.row), "|u1"))
        originals = OriginalsWriter(draft, len(split.indices)) if keeps else None
        if originals is not None:
            stack.enter_context(originals.file)
        for chunk in _decoded(split, form, watch, keep=keeps):
            piece = np.stack([pixels_ for pixels_, _ in chunk])
            watch.see(name, split, piece)
            pixels.write(piece)
            if originals is not None:
                for _, original in chunk:
                    originals.write(original)
    files = {f"{name}_labels": labels, f"{name}_pixels": pixels}
    return files | (originals.finish() if originals is not None else {})


def transform_for(form: ImageForm) -> Callable[[Image.Image], Any]:
    """timm's evaluation transform to a uint8 tensor C×H×W: nothing is normalised yet."""
    from timm.data import create_transform

    transform: Callable[[Image.Image], Any] = create_transform(
        input_size=form.row, normalize=False, **asdict(form.preprocessing)
    )
    return transform


def _decoded(split: Chosen, form: ImageForm, watch: _Watch, *, keep: bool) -> Iterator[list[tuple[Array, Array]]]:
    """(C×H×W, the original H×W×C where they are kept) of each image, decoded by threads: Pillow releases the
    interpreter while it works. In place of what cannot be read there are zeros, and `watch` knows."""
    transform = transform_for(form)
    nothing = np.zeros((0, 0, form.channels), dtype=np.uint8)

    def decode_one(index: int) -> tuple[Array, Array]:
        try:
            image = form.open(split.part, index)
        except DataError as error:
            watch.failures.setdefault(split.origin, {})[index] = str(error)
            return np.zeros(form.row, dtype=np.uint8), nothing
        original = shrunk(image, form.original_side) if keep and form.original_side is not None else nothing
        return np.asarray(transform(image)), original

    rest = iter(split.indices.tolist())
    with ThreadPoolExecutor(form.workers) as pool:
        while chunk := list(islice(rest, _CHUNK)):
            begun = [(pool.submit(decode_one, index), split.part.called(index)) for index in chunk]
            yield [wait_for(image, name) for image, name in begun]


@dataclass(slots=True)
class _Watch:
    """What is noticed while images pass by: mean and standard deviation of the training images' channels (scale 0–1),
    images of one colour, and those that cannot be read."""

    channels: int
    failures: dict[str, dict[int, str]] = field(default_factory=dict)
    _count: int = 0
    _plain: list[str] = field(default_factory=list)
    _plain_labels: Counter[int] = field(default_factory=Counter)
    _labels: Counter[int] = field(default_factory=Counter)
    _sum: Array = field(init=False)
    _squares: Array = field(init=False)
    _seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._sum, self._squares = np.zeros(self.channels), np.zeros(self.channels)

    def see(self, name: str, split: Chosen, pixels: Array) -> None:
        """Takes note of the next images N×C×H×W of a split."""
        indices = split.indices[self._seen[name] : self._seen[name] + len(pixels)]
        self._seen[name] += len(pixels)
        flat = (pixels.max(axis=(2, 3)) == pixels.min(axis=(2, 3))).all(axis=1)
        self._plain += [split.part.called(int(index)) for index in indices[flat][: _NAMED - len(self._plain)]]
        self._plain_labels.update(split.part.labels[indices[flat]].tolist())
        self._labels.update(split.part.labels[indices].tolist())
        if name == "train":
            values = pixels.astype(np.float64) / 255
            self._count += values.size // self.channels
            self._sum += values.sum(axis=(0, 2, 3))
            self._squares += (values**2).sum(axis=(0, 2, 3))

    def moments(self) -> dict[str, list[float]]:
        """The `mean` and `std` of each channel; a channel that never changes gets the std 1."""
        mean = self._sum / self._count
        std = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0))
        return {"mean": mean.round(6).tolist(), "std": np.where(std > 1e-4, std, 1.0).round(6).tolist()}

    def remarks(self, class_names: Sequence[str]) -> list[str]:
        """One line where images, or all those of a class, have a single colour."""
        count = sum(self._plain_labels.values())
        if not count:
            return []
        empty = [class_names[label] for label, plain in self._plain_labels.items() if plain == self._labels[label]]
        whole = f", among them all of the class {' and of the class '.join(map(repr, empty[:3]))}" if empty else ""
        return [f"{count} of {sum(self._labels.values())} images have one colour alone{whole}: e.g. {self._plain[0]}"]
