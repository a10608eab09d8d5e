"""Images that stream are the same images, in the same batches, as those in memory."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nas_kd.data import images as data_images
from nas_kd.data.augment import AnyAugmentation, Augmentation, PhotoAugmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.data.mixing import Mixing
from nas_kd.data.prefetching import work_ahead
from nas_kd.data.splits import DataSpec, Splits, load_splits, with_sample
from nas_kd.data.streaming import StreamedImages
from nas_kd.errors import DataError
from nas_kd.preparation.image_form import beside_gpu
from nas_kd.training.evaluation import evaluate
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import Teacher
from nas_kd.training.views import OnlineViews, ViewSpec, build_views

EVERYTHING = PhotoAugmentation(scale=(0.3, 1), auto_augment="rand-m5", re_prob=0.5)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """ImageNet's layout: 2 × 20 JPEGs to train on, among them panoramas, and 2 × 4 to look at."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 4)):
        for name in ("n01440764", "n02102040"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = (40 + number, 50, 3) if number else (40, 130, 3)
                Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.JPEG")
    return tmp_path / "photos"


def spec_of(photos: Path, *, in_chans: int = 3, memory: int | None = None, skip_unreadable: bool = False) -> DataSpec:
    return DataSpec(
        data_dir=str(photos), img_size=16, in_chans=in_chans, originals=2.0, memory=memory,
        skip_unreadable=skip_unreadable,
    )  # fmt: skip


@pytest.fixture
def both(photos: Path, tmp_path: Path) -> tuple[Splits, Splits]:
    """The photos in memory, and as they stream."""
    kept, streamed = (load_splits(spec_of(photos, memory=memory), tmp_path / "cache") for memory in (10**9, 0))
    assert isinstance(streamed.train, Images)  # arrays that are there are used
    return kept, load_splits(spec_of(photos, memory=0), tmp_path / "elsewhere")


@pytest.mark.parametrize("in_chans", [1, 3])
def test_they_are_the_same_images(in_chans: int, photos: Path, tmp_path: Path) -> None:
    spec = spec_of(photos, in_chans=in_chans)
    kept, streamed = load_splits(spec, tmp_path / "kept"), load_splits(replace(spec, memory=0), tmp_path / "streamed")
    assert isinstance(streamed.train, StreamedImages)
    assert (streamed.digest, streamed.mean, streamed.std) == (kept.digest, kept.mean, kept.std)
    for one, other in zip(
        (kept.train, kept.val, kept.test), (streamed.train, streamed.val, streamed.test), strict=True
    ):
        assert torch.equal(one.decoded().pixels, other.decoded().pixels)
        assert torch.equal(one.labels, other.labels)
        assert (one.shape, one.bytes) == (other.shape, other.bytes)
    some = torch.tensor([5, 3])
    assert torch.equal(streamed.train[some].decoded().pixels, kept.train.take(some))
    for index in (0, 7):
        assert np.array_equal(np.asarray(streamed.train.picture(index)), np.asarray(kept.train.picture(index)))
        assert np.array_equal(np.asarray(streamed.val.picture(index)), np.asarray(kept.val.picture(index)))
    assert {path.name for path in (tmp_path / "streamed").rglob("*") if path.is_file()} == {"meta.json"}


@pytest.mark.parametrize("augmentation", [EVERYTHING, Augmentation(shift=0.2)])
@pytest.mark.parametrize("mixing", [None, Mixing(num_classes=2, mixup=0.3, cutmix=1.0)])
def test_the_batches_of_a_seed_are_the_same_whoever_makes_them(
    both: tuple[Splits, Splits], augmentation: AnyAugmentation, mixing: Mixing | None
) -> None:
    kept, streamed = (AugmentedImages(splits.train, augmentation, 3, mixing) for splits in both)
    order = torch.split(torch.randperm(len(kept)), 9)
    assert isinstance(streamed.images, StreamedImages)
    alone = replace(streamed, images=replace(streamed.images, form=replace(streamed.images.form, workers=1)))
    beside = replace(kept, images=replace(both[0].train, workers=2))
    for data in (streamed, alone, beside):
        for expected, batch in zip(kept.batches(2, order), data.batches(2, order), strict=True):
            assert torch.equal(expected.pixels, batch.pixels)
            assert torch.equal(expected.labels, batch.labels)
    assert torch.equal(kept.sample(30).pixels, streamed.sample(30).pixels)
    assert torch.equal(kept.sample(30).pixels, beside.sample(30).pixels)


def test_photos_in_memory_are_transformed_by_processes_beside_a_gpu(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(work: Callable[[Any], Any], items: Sequence[Any], *, processes: int, source: str) -> Iterator[Any]:
        asked.append(processes)
        return work_ahead(work, items, processes=processes, source=source)

    monkeypatch.setattr(data_images, "work_ahead", counted)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for device, transformed in (("cpu", []), ("cuda", [3, 3])):
        own = beside_gpu(spec_of(photos), torch.device(device))
        splits = load_splits(own, tmp_path)
        views = build_views(splits.train, None, ViewSpec(count=2, augmentation=EVERYTHING), tmp_path / device)
        assert asked == transformed
        expected = AugmentedImages(replace(splits.train, workers=0), EVERYTHING).batch(1, torch.arange(5)).pixels
        assert torch.equal(views.pixels[1, :5], expected)
    few = AugmentedImages(replace(splits.train, workers=3), Augmentation())
    assert len(list(few.batches(0, torch.split(torch.arange(12), 4)))) == 3
    assert asked == [3, 3]


def test_a_training_gives_the_same_weights(both: tuple[Splits, Splits]) -> None:
    results = []
    for splits in both:
        torch.manual_seed(0)
        teacher, network = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2)) for _ in "ab")
        data = OnlineViews(AugmentedImages(splits.train, EVERYTHING, 1), Teacher(teacher))
        result = train(network, data, Recipe(epochs=2, batch_size=8, lr=0.01, eval_epochs=(1, 2)), val=splits.val)
        results.append((result.losses, result.accuracies, evaluate(network, splits.test), network[0].weight.tolist()))
    assert results[0] == results[1]


def test_what_cannot_be_read_is_named_at_once_or_left_out_alike(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train/n01440764/3.JPEG", "val/n02102040/0.JPEG"):
        (photos / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read 2 images: .*3\.JPEG.*0\.JPEG.*--skip-unreadable"):
        load_splits(spec_of(photos, memory=0), tmp_path / "streamed")
    kept = load_splits(spec_of(photos, skip_unreadable=True), tmp_path / "kept")
    for _ in range(2):  # the second time by what was noted
        caplog.clear()
        streamed = load_splits(spec_of(photos, memory=0, skip_unreadable=True), tmp_path / "streamed")
        assert "2 images of" in caplog.text
        assert streamed.digest == kept.digest
        assert torch.equal(streamed.train.decoded().pixels, kept.train.decoded().pixels)
        assert torch.equal(streamed.test.decoded().pixels, kept.test.decoded().pixels)


def test_a_file_that_vanishes_is_one_line_and_may_come_back(both: tuple[Splits, Splits], photos: Path) -> None:
    kept, streamed = (AugmentedImages(splits.train, EVERYTHING) for splits in both)
    order = torch.split(torch.arange(len(kept)), 8)
    file = photos / "train/n02102040/11.JPEG"
    content = file.read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(content[:200])):
        damage()
        with pytest.raises(
            DataError, match=r"cannot read the image .*11\.JPEG.*put it back, and the same command goes"
        ):
            list(streamed.batches(0, order))
    file.write_bytes(content)
    for expected, batch in zip(kept.batches(0, order), streamed.batches(0, order), strict=True):
        assert torch.equal(expected.pixels, batch.pixels)


def test_it_is_looked_through_once(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            load_splits(spec_of(photos, memory=0), tmp_path)
    assert caplog.text.count("looking through 48 images") == 1
    next(tmp_path.glob("stream-*/meta.json")).write_text("{")
    with caplog.at_level(logging.INFO):
        load_splits(spec_of(photos, memory=0), tmp_path)
    assert "is damaged" in caplog.text
    assert caplog.text.count("looking through 48 images") == 2


def test_processes_that_share_no_memory_can_be_given_them(both: tuple[Splits, Splits]) -> None:
    kept, streamed = both
    given = pickle.loads(pickle.dumps(streamed.train[:4]))
    assert torch.equal(given.take(torch.arange(4)), kept.train.take(torch.arange(4)))


def test_a_search_looks_at_a_sample_in_memory(
    both: tuple[Splits, Splits], photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, streamed = both
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            sample = with_sample(streamed, spec_of(photos), 10, tmp_path)
    assert caplog.text.count("decoding 18 images") == 1
    assert sample.digest == kept.digest
    assert isinstance(sample.train, Images)
    crops = [AugmentedImages(images, EVERYTHING).sample(10).pixels for images in (sample.train, kept.train)]
    assert torch.equal(*crops)
    assert torch.equal(sample.val.decoded().pixels, kept.val.decoded().pixels)
    assert with_sample(kept, spec_of(photos), 10, tmp_path) is kept


def test_what_streams_needs_little_of_the_disk(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    with pytest.raises(DataError, match=r"needs 1 MiB .* its disk has 64 MiB free: .* --data-memory 0"):
        load_splits(spec_of(photos), tmp_path / "kept")
    assert len(load_splits(spec_of(photos, memory=0), tmp_path / "streamed").train) == 32
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(DataError, match=r"its disk has 0 MiB free"):
        load_splits(spec_of(photos, memory=0), tmp_path / "full")


def test_the_bound_counts_what_arrays_would_take(photos: Path, tmp_path: Path) -> None:
    images = 40 + 8  # and originals, of 4:3, twice as large as what a network sees
    needed = images * (16 * 16 * 3 + 8) + round(32 * 32 * 32 * 3 * 4 / 3)
    kinds: dict[int, Callable[..., object]] = {needed - 1: StreamedImages, needed: Images}
    for memory, kind in kinds.items():
        assert isinstance(load_splits(spec_of(photos, memory=memory), tmp_path / str(memory)).train, kind)
