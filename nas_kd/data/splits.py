"""A dataset as three splits of decoded images: scikit-learn's digits, or what timm's dataset factory finds on disk."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nas_kd.data import sources
from nas_kd.data.cutting import TEST_FRACTION, DataSpec, check_source, cut
from nas_kd.data.dataset_names import DIGITS
from nas_kd.data.decoding import ImageForm, UnreadableError, decode, decoded_bytes, look_through
from nas_kd.data.images import Images, ImageSet, normalise
from nas_kd.data.originals import Originals, open_originals, original_side
from nas_kd.data.preprocessing import Preprocessing
from nas_kd.data.sources import Source
from nas_kd.data.streaming import StreamedImages
from nas_kd.errors import DataError
from nas_kd.files.arrays import Array, load_arrays
from nas_kd.files.digests import digest_of

__all__ = ["DIGITS", "DataSpec", "Images", "Splits", "load_splits", "normalise"]

LOOK = 10_000  # validation images that a search looks at, where they stream
_PARTS = ("train", "val", "test")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The images to train on, to select on and (once) to test on. `digest` names their content, form and cut; `folder`
    is where they are cached, if they are."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
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
        return self.train.originals if isinstance(self.train, Images) else None


def load_splits(spec: DataSpec, cache_dir: Path) -> Splits:
    """Reads, cuts, decodes and caches the dataset; the second time it is memory-mapped from `cache_dir`.

    Where the dataset has both, its validation split is what is selected on and its test split the test; where it has
    one of them, that is the test, and a log line says so where it has none: then validation and test are cut from the
    training split by seed, class by class. Training and validation images come in an order in which the first images,
    however many, hold the classes in equal parts. Nothing is downloaded.
    What would take more than `spec.memory` is looked through once instead, and decoded when it is used: the same images
    in the same order, unless arrays of it are in `cache_dir` already.
    Raises DataError for everything that is wrong with the data, before any image is decoded where that is possible,
    and OutputError when the cache cannot be written.
    """
    source = sources.open_source(spec.dataset, spec.data_dir, spec.class_map)
    check_source(source, spec)
    key = _digest(spec, source)
    folder = cache_dir / f"images-{key[:16]}"
    streams = not folder.exists() and _is_too_large(source, spec)
    if streams:
        folder = cache_dir / f"stream-{key[:16]}"
    loaded = load_arrays(folder)
    if loaded is None:
        (_look_through if streams else _decode)(source, spec, folder)
        loaded = load_arrays(folder)
        if loaded is None:
            raise DataError(f"the images in {folder} were damaged while they were written: check the disk")
    arrays, extra = loaded
    for note in extra.get("notes", ()):
        _logger.warning("%s", note)
    parts = _streamed(extra, spec, source) if streams else _images(arrays, _PARTS, spec, *_moments(extra, spec))
    return _united(parts, spec, source, folder)


def _is_too_large(source: Source, spec: DataSpec) -> bool:
    return spec.memory is not None and decoded_bytes(cut(source, spec), _streamed_form(spec)) > spec.memory


def _decode(source: Source, spec: DataSpec, folder: Path) -> None:
    """Decodes the dataset, without what cannot be read if the spec says so."""

    def attempt(source: Source, skipped: Skipped) -> None:
        chosen = cut(source, spec)
        side, remarks = _originals_side(spec, len(chosen["train"]), folder.parent)
        form = replace(_streamed_form(spec), original_side=side)
        decode(chosen, form, source.class_names, folder, [*_about(skipped, source), *remarks])

    _without_unreadable(attempt, source, spec, folder)


def _look_through(source: Source, spec: DataSpec, folder: Path) -> None:
    """Looks through a dataset that streams, and notes what cannot be read."""

    def attempt(source: Source, skipped: Skipped) -> None:
        left_out = [{part: list(images) for part, images in failures.items()} for failures in skipped]
        extra = {"left out": left_out, "notes": _about(skipped, source)}
        look_through(cut(source, spec), _streamed_form(spec), source.class_names, folder, extra)

    _without_unreadable(attempt, source, spec, folder)


Skipped = list[Mapping[str, Mapping[int, str]]]  # by attempt what could not be read: part, number, reason


def _without_unreadable(
    attempt: Callable[[Source, Skipped], None], source: Source, spec: DataSpec, folder: Path
) -> None:
    """Repeats the attempt without what cannot be read, if the spec says so."""
    skipped: Skipped = []
    while True:
        try:
            return attempt(source, skipped)
        except UnreadableError as error:
            if not spec.skip_unreadable:
                raise error.explain(folder.parent) from error
            skipped.append(error.failures)
            source = source.without(error.failures)
            check_source(source, spec)


def _streamed_form(spec: DataSpec) -> ImageForm:
    """What images become, with originals as large as they are wanted."""
    return ImageForm(
        size=spec.img_size,
        channels=spec.in_chans,
        preprocessing=spec.preprocessing,
        workers=spec.workers,
        original_side=None if spec.originals is None else round(spec.originals * spec.img_size),
    )


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


def _about(skipped: Skipped, source: Source) -> list[str]:
    reasons = [reason for failures in skipped for part in failures.values() for reason in part.values()]
    return [f"{len(reasons)} images of {source.name} are left out: {reasons[0]}, …"] if reasons else []


def _streamed(extra: dict[str, Any], spec: DataSpec, source: Source) -> dict[str, StreamedImages]:
    """The images of every split, as far as they can be read."""
    mean, std = _moments(extra, spec)
    form = _streamed_form(spec)
    forms = {"train": form, **dict.fromkeys(("val", "test"), replace(form, original_side=None))}
    for failures in extra["left out"]:
        source = source.without(failures)
    return {
        name: StreamedImages(chosen, forms[name], torch.from_numpy(chosen.labels), mean, std, source.name)
        for name, chosen in cut(source, spec).items()
    }


def _moments(extra: Mapping[str, Any], spec: DataSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel: as given, else those of the training images."""
    given = (spec.mean, spec.std)
    found = (tuple(extra[name]) if own is None else own for name, own in zip(("mean", "std"), given, strict=True))
    mean, std = (_per_channel(values, spec.in_chans) for values in found)
    return mean, std


def _united(parts: Mapping[str, ImageSet], spec: DataSpec, source: Source, folder: Path) -> Splits:
    mean, std = parts["train"].mean, parts["train"].std
    digest = digest_of(json.dumps([_digest(spec, source), mean, std]))
    return Splits(
        train=parts["train"],
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


def with_sample(splits: Splits, spec: DataSpec, train: int, cache_dir: Path) -> Splits:
    """The same splits in memory, as far as a search looks at them: of those that stream the first `train` training
    images, and 10,000 validation images, are decoded into `cache_dir`. Raises what `load_splits` raises."""
    if not isinstance(splits.train, StreamedImages) or not isinstance(splits.val, StreamedImages):
        return splits
    some = {"train": splits.train[:train], "val": splits.val[:LOOK]}
    key = digest_of(f"{splits.digest} {spec.originals} {train} {LOOK}", 64)
    folder = cache_dir / f"images-{key[:16]}"
    loaded = load_arrays(folder)
    if loaded is None:
        side, remarks = _originals_side(spec, len(some["train"]), cache_dir)
        form = replace(splits.train.form, original_side=side)
        try:
            decode({name: part.chosen for name, part in some.items()}, form, splits.class_names, folder, remarks)
        except UnreadableError as error:
            raise error.explain(cache_dir) from error
        loaded = load_arrays(folder)
        assert loaded is not None
    images = _images(loaded[0], (*some,), spec, splits.mean, splits.std)
    return replace(splits, train=images["train"], val=images["val"], folder=folder)


def _images(
    arrays: dict[str, Array], parts: Sequence[str], spec: DataSpec, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Images]:
    """The decoded images of these parts; those to train on with their originals, and who transforms them."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if name.startswith(tuple(parts))}
    found = {part: Images(tensors[f"{part}_pixels"], tensors[f"{part}_labels"], mean, std) for part in parts}
    originals = open_originals(arrays, len(mean))
    return found | {"train": replace(found["train"], originals=originals, workers=spec.photo_workers)}


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
    return digest_of(json.dumps([2, source.fingerprint, form]), 64)
