"""Images in WebDataset shards are those that went into them, and a shard that is not whole is told."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.data.splits import DataSpec, load_splits
from nas_kd.errors import DataError


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    generator = np.random.default_rng(number)
    Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_shard(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            shard.addfile(about, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards to train on with eight images each of two classes, and one to look at, as img2dataset names them."""
    root = tmp_path / "shards"
    root.mkdir()
    for name, first in (("train-000", 0), ("train-001", 8), ("train-002", 16), ("validation-00", 24)):
        files = {}
        for number in range(first, first + 8):
            files[f"{number:05}.jpg"] = jpeg(number)
            files[f"{number:05}.cls"] = b"%d\n" % (number % 2)
            files[f"{number:05}.json"] = b"{}"
        write_shard(root / f"small-{name}.tar", files)
    return root


def spec_of(root: Path, **form: int) -> DataSpec:
    return DataSpec(dataset="wds", data_dir=str(root), img_size=16, val_fraction=0.25, **form)  # type: ignore[arg-type]


def test_shards_hold_the_images_of_a_folder(shards: Path, tmp_path: Path) -> None:
    for number in range(32):
        folder = tmp_path / "folder" / ("train" if number < 24 else "val") / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05}.jpg").write_bytes(jpeg(number))
    folder_splits = load_splits(DataSpec(data_dir=str(tmp_path / "folder"), img_size=16), tmp_path / "cache")
    splits = load_splits(spec_of(shards), tmp_path / "cache")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 6, 8)
    assert splits.class_names == ("0", "1")
    assert splits.test.labels.tolist() == [0, 1] * 4
    seen = [{image.numpy().tobytes() for image in part.test.decoded().pixels} for part in (splits, folder_splits)]
    assert seen[0] == seen[1]


def test_they_stream_as_they_are_in_memory(shards: Path, tmp_path: Path) -> None:
    kept, streamed = (load_splits(spec_of(shards, memory=m), tmp_path / str(m)).train for m in (10**9, 0))
    assert isinstance(kept, Images)
    assert not isinstance(streamed, Images)
    order = torch.split(torch.randperm(18), 5)
    batches = [AugmentedImages(images, Augmentation(), 1).batches(3, order) for images in (kept, streamed)]
    for expected, batch in zip(*batches, strict=True):
        assert torch.equal(expected.pixels, batch.pixels)
        assert torch.equal(expected.labels, batch.labels)


@pytest.mark.parametrize("name", ["_info.json", "info.json"])
def test_a_list_as_timm_has_it_says_which_shards_there_are(shards: Path, tmp_path: Path, name: str) -> None:
    files = ["small-train-000.tar", "small-train-001.tar"]
    about = {"name": "train", "num_samples": 16, "filenames": files, "shard_lengths": [8, 8]}
    (shards / name).write_text(json.dumps({"splits": {"train": about}}))
    splits = load_splits(spec_of(shards), tmp_path)
    assert len(splits.train) + len(splits.val) + len(splits.test) == 16
    (shards / files[1]).unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards are missing in .*: small-train-001\.tar"):
        load_splits(spec_of(shards), tmp_path)
    (shards / name).write_text(
        json.dumps({"splits": {"train": {**about, "filenames": files[:1], "shard_lengths": [9]}}})
    )
    with pytest.raises(DataError, match=r"small-train-000\.tar holds 8 images, its list says 9"):
        load_splits(spec_of(shards), tmp_path)
    (shards / name).write_text("[]")
    with pytest.raises(DataError, match="as timm's list of shards"):
        load_splits(spec_of(shards), tmp_path)


def test_a_gap_in_the_numbers_is_a_missing_shard(shards: Path, tmp_path: Path) -> None:
    (shards / "small-train-001.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 4 shards are missing in .*: small-train-001\.tar$"):
        load_splits(spec_of(shards), tmp_path)


def test_a_shard_that_is_broken_or_without_classes_is_told(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "small-train-002.tar").read_bytes()
    (shards / "small-train-002.tar").write_bytes(whole[:4000])
    with pytest.raises(DataError, match=r"cannot read the shard .*small-train-002\.tar: .*fetch it again"):
        load_splits(spec_of(shards), tmp_path)
    write_shard(shards / "small-train-002.tar", {"00001.jpg": jpeg(1), "00002.jpg": jpeg(2), "00002.cls": b"1"})
    with pytest.raises(DataError, match=r"the image 00001 in .* has no class"):
        load_splits(spec_of(shards), tmp_path)


def test_a_shard_that_vanishes_is_one_line(shards: Path, tmp_path: Path) -> None:
    train = load_splits(spec_of(shards, memory=0), tmp_path).train
    (shards / "small-train-001.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read the image at byte \d+ of .*small-train-001\.tar.*put it back"):
        train.decoded()


def test_without_a_word_the_way_to_them_is_told(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images .* but archives: --dataset wds reads WebDataset shards"):
        load_splits(DataSpec(data_dir=str(shards)), tmp_path)
    with pytest.raises(DataError, match=r"there are no shards \(\.tar\) in"):
        load_splits(spec_of(tmp_path), tmp_path)
