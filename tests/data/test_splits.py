from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torchvision.datasets import FashionMNIST

from nas_kd.data.images import Images, normalise
from nas_kd.data.preprocessing import Preprocessing
from nas_kd.data.splits import DataSpec, load_splits
from nas_kd.errors import DataError, OutputError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes image folders: `write("train", cat=5, dog=3)` makes 5 and 3 PNG files with random pixels."""

    def make(part: str, *, size: tuple[int, int] = (12, 10), mode: str = "RGB", **counts: int) -> Path:
        generator = np.random.default_rng(len(part))
        for name, count in counts.items():
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / f"{index}.png")
        return tmp_path / "images"

    return make


def folder_spec(root: Path, img_size: int = 8, in_chans: int = 3) -> DataSpec:
    return DataSpec(dataset="", data_dir=str(root), img_size=img_size, in_chans=in_chans, val_fraction=0.25)


def test_the_digits_are_cut_class_by_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        splits = load_splits(DataSpec(img_size=16, in_chans=1), tmp_path)
    assert "has no test split" in caplog.text
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1151, 287, 359)
    assert splits.train.pixels.shape == (1151, 1, 16, 16)
    assert splits.train.pixels.max() == 255
    assert splits.class_names == tuple("0123456789")
    for part in (splits.train, splits.val, splits.test):
        share = torch.bincount(part.labels) / len(part)
        assert (share - 0.1).abs().max() < 0.01


def test_the_splits_share_no_image(tmp_path: Path) -> None:
    splits = load_splits(DataSpec(img_size=8, in_chans=1), tmp_path)
    seen = [{image.numpy().tobytes() for image in part.pixels} for part in (splits.train, splits.val, splits.test)]
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_any_prefix_holds_all_classes_alike(tmp_path: Path) -> None:
    # trials train on the first images and batch norms are recalibrated on them
    splits = load_splits(DataSpec(img_size=8, in_chans=1), tmp_path)
    for images in (splits.train, splits.val):
        counts = torch.bincount(images.labels[:55], minlength=10)
        assert counts.max() - counts.min() <= 1


def test_the_seed_decides_the_cut(tmp_path: Path) -> None:
    first, again, other = (
        load_splits(DataSpec(img_size=8, in_chans=1, seed=seed), tmp_path / str(place))
        for place, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(first.val.pixels, again.val.pixels)
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert not torch.equal(first.val.pixels, other.val.pixels)


def test_the_second_time_it_comes_from_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = DataSpec(img_size=8, in_chans=1)
    first = load_splits(spec, tmp_path)
    with caplog.at_level(logging.INFO):
        second = load_splits(spec, tmp_path)
    assert "decoding" not in caplog.text
    assert torch.equal(first.train.pixels, second.train.pixels)


def test_a_damaged_cache_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = DataSpec(img_size=8, in_chans=1)
    first = load_splits(spec, tmp_path).train.pixels.clone()
    file = next(tmp_path.glob("images-*/train_pixels.npy"))
    file.write_bytes(file.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        second = load_splits(spec, tmp_path)
    assert "is damaged" in caplog.text
    assert torch.equal(first, second.train.pixels)


def test_train_images_limits_every_class_alike(tmp_path: Path) -> None:
    splits = load_splits(DataSpec(img_size=8, in_chans=1, train_images=105), tmp_path)
    assert len(splits.train) == 105
    assert set(torch.bincount(splits.train.labels).tolist()) == {10, 11}


def test_mean_and_std_come_from_the_training_images(tmp_path: Path) -> None:
    splits = load_splits(DataSpec(img_size=8, in_chans=1), tmp_path)
    values = normalise(splits.train.pixels, splits.mean, splits.std, torch.device("cpu"))
    assert values.mean().item() == pytest.approx(0, abs=1e-3)
    assert values.std().item() == pytest.approx(1, abs=1e-3)


def test_given_mean_and_std_are_used_for_every_channel(tmp_path: Path) -> None:
    splits = load_splits(DataSpec(img_size=8, in_chans=3, mean=(0.5,), std=(0.1, 0.2, 0.4)), tmp_path)
    assert (splits.mean, splits.std) == ((0.5,) * 3, (0.1, 0.2, 0.4))
    pixels = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    values = normalise(pixels, splits.mean, splits.std, torch.device("cpu"))
    torch.testing.assert_close(values.flatten(), torch.tensor([5.0, 2.5, 1.25]))


def test_image_folders_use_their_own_test_split(tmp_path: Path, write: Write) -> None:
    write("train", cat=8, dog=12)
    root = write("validation", cat=2, dog=3)
    splits = load_splits(folder_spec(root), tmp_path / "cache")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (15, 5, 5)
    assert splits.class_names == ("cat", "dog")
    assert splits.test.labels.tolist() == [0, 0, 1, 1, 1]


def test_test_labels_follow_the_names_of_the_training_classes(tmp_path: Path, write: Write) -> None:
    write("train", cat=4, dog=4)
    splits = load_splits(folder_spec(write("test", dog=3)), tmp_path / "cache")
    assert splits.test.labels.tolist() == [1, 1, 1]


def test_a_flat_folder_is_cut_three_times(tmp_path: Path, write: Write) -> None:
    splits = load_splits(folder_spec(write(".", cat=10, dog=10), in_chans=1), tmp_path / "cache")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 4, 4)
    assert splits.train.pixels.shape == (12, 1, 8, 8)


def test_images_are_resized_and_cropped_at_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200  # a square in the middle third
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    splits = load_splits(folder_spec(tmp_path / "images", img_size=5), tmp_path / "cache")
    # the outermost columns blend with their neighbours, as bilinear resizing does
    assert (splits.train.pixels[..., 1:-1] == 200).all()


def test_changed_files_are_decoded_again(tmp_path: Path, write: Write) -> None:
    root = write(".", cat=6, dog=6)
    first = load_splits(folder_spec(root), tmp_path / "cache").digest
    os.utime(root / "cat" / "0.png", ns=(1, 1))
    assert load_splits(folder_spec(root), tmp_path / "cache").digest != first


def test_torchvision_datasets_are_read_where_they_lie(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    _write_mnist(raw, "train", 60)
    _write_mnist(raw, "t10k", 20)
    spec = DataSpec(dataset="torch/fashion_mnist", data_dir=str(tmp_path), img_size=32, in_chans=3)
    splits = load_splits(spec, tmp_path / "cache")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (50, 10, 20)
    assert splits.class_names == tuple(FashionMNIST.classes)
    assert splits.test.labels.tolist() == [index % 10 for index in range(20)]


def _write_mnist(raw: Path, part: str, count: int) -> None:
    """idx files as torchvision lays them out: magic number, dimensions, bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
        (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: DataSpec(dataset="cifra10"), r"unknown dataset 'cifra10'.*did you mean 'torch/cifar10'"),
        (lambda: DataSpec(dataset="torch/fashion_mnits"), "did you mean 'torch/fashion_mnist'"),
        (lambda: DataSpec(dataset="foo/bar"), "unknown dataset 'foo/bar'"),
        (lambda: DataSpec(dataset="tfds/cifar10"), "is a stream: save its images as folders"),
        (lambda: DataSpec(in_chans=2), "images have 1 or 3 channels, got in_chans=2"),
        (lambda: DataSpec(img_size=0), "img_size must be at least 1, got 0"),
        (lambda: DataSpec(val_fraction=1.0), r"val_fraction must lie in \(0, 1\)"),
        (lambda: DataSpec(mean=(0.1, 0.2)), "mean needs 1 or 3 values, got 2"),
    ],
)
def test_bad_specs_are_refused_at_once(spec: Callable[[], DataSpec], message: str) -> None:
    with pytest.raises(DataError, match=message):
        spec()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec(dataset=""), "give its folder with --data-dir"),
        (DataSpec(dataset="folder", data_dir="/no/such/place"), "there is no data folder /no/such/place"),
        (DataSpec(dataset="torch/cifar10", data_dir="."), "nothing is downloaded"),
        (DataSpec(num_classes=7), "has 10 classes, --num-classes is 7"),
        (DataSpec(train_images=5), "5 training images are too few for 10 classes"),
    ],
)
def test_missing_data_is_refused(tmp_path: Path, spec: DataSpec, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_splits(spec, tmp_path)


def test_an_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match="is an archive: unpack it"):
        load_splits(folder_spec(tmp_path / "x.tar"), tmp_path / "cache")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images \(\.jpg, \.png, whatever Pillow reads\) in"):
        load_splits(folder_spec(tmp_path), tmp_path / "cache")


def test_an_unreadable_image_is_named(tmp_path: Path, write: Write) -> None:
    root = write(".", cat=6, dog=6)
    broken = root / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"cannot read the image .*3\.png"):
        load_splits(folder_spec(root), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_validation_and_test_of_its_own_are_both_used(tmp_path: Path, write: Write) -> None:
    write("train", cat=8, dog=12)
    write("val", cat=2, dog=3)
    splits = load_splits(folder_spec(write("test", cat=1, dog=5)), tmp_path / "cache")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (20, 5, 6)
    assert torch.bincount(splits.val.labels).tolist() == [2, 3]
    assert splits.test.labels.tolist() == [0, 1, 1, 1, 1, 1]


def test_all_unreadable_images_are_named_at_once(tmp_path: Path, write: Write) -> None:
    write("train", cat=9, dog=9)
    root = write("test", cat=4, dog=14)
    broken = [root / "train/dog/3.png", root / "train/cat/1.png", *(root / f"test/dog/{n}.png" for n in range(1, 13))]
    for path in broken[:2]:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"cannot read 2 images: .*\.png: .*\.png: .*--skip-unreadable"):
        load_splits(folder_spec(root), tmp_path / "cache")
    for path in broken[2:]:
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read 14 images: .* and 4 more, all of them in .*unreadable\.txt"):
        load_splits(folder_spec(root), tmp_path / "cache")
    named = (tmp_path / "cache" / "unreadable.txt").read_text()
    assert all(str(path) in named for path in broken)


def test_one_can_go_on_without_unreadable_images(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("train", cat=9, dog=9)
    root = write("test", cat=4, dog=4)
    for name in ("train/dog/3.png", "test/cat/0.png"):
        (root / name).write_bytes(b"")
    spec = replace(folder_spec(root), skip_unreadable=True)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            splits = load_splits(spec, tmp_path / "cache")
        assert len(splits.train) + len(splits.val) == 17
        assert splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
        assert "2 images of" in caplog.text
        assert "are left out" in caplog.text
    for index in range(9):
        (root / f"train/dog/{index}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"the class 'dog' of .* has no images in train"):
        load_splits(spec, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.txt", "dog\nemu\ncat\n"),
        ("map.json", '["dog", "emu", "cat"]'),
        ("map.json", '{"cat": 2, "dog": 0, "emu": 1}'),
    ],
)
def test_a_class_map_numbers_the_classes(tmp_path: Path, write: Write, name: str, text: str) -> None:
    root = write("train", cat=8, dog=4)
    (root / name).write_text(text)
    for where in (name, str(root / name)):  # timm looks into the data folder too
        splits = load_splits(replace(folder_spec(root), class_map=where), tmp_path / "cache")
        assert (splits.class_names, splits.num_classes) == (("dog", "emu", "cat"), 3)
        assert set(splits.train.labels.tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dog\n", "the class 'cat' of the images is not in the class map"),
        ("dog\ncta\n", "did you mean 'cta'"),
        ("dog\ndog\ncat", "each once"),
        ("", "each once"),
    ],
)
def test_a_class_map_that_does_not_fit_is_refused(tmp_path: Path, write: Write, text: str, said: str) -> None:
    root = write("train", cat=8, dog=4)
    (root / "map.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        load_splits(replace(folder_spec(root), class_map="map.txt"), tmp_path / "cache")
    with pytest.raises(DataError, match="there is no class map gone"):
        load_splits(replace(folder_spec(root), class_map="gone"), tmp_path / "cache")
    with pytest.raises(DataError, match="numbers the classes of image folders"):
        load_splits(DataSpec(class_map="map.txt"), tmp_path / "cache")


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(crop_pct=0.875, interpolation="bicubic"),
        Preprocessing(crop_pct=0.9, interpolation="nearest", crop_mode="squash"),
        Preprocessing(),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_what_timm_evaluates(
    tmp_path: Path, write: Write, preprocessing: Preprocessing, channels: int
) -> None:
    write("train", cat=4, dog=4)
    root = write("test", size=(40, 23), cat=2, dog=2)
    spec = replace(folder_spec(root, img_size=14, in_chans=channels), preprocessing=preprocessing)
    splits = load_splits(spec, tmp_path / "cache")
    transform = timm.data.create_transform((channels, 14, 14), normalize=False, **asdict(preprocessing))
    files = [root / "test" / name / f"{index}.png" for name in ("cat", "dog") for index in range(2)]
    for pixels, file in zip(splits.test.pixels, files, strict=True):
        assert torch.equal(pixels, transform(Image.open(file).convert("L" if channels == 1 else "RGB")))


@pytest.mark.parametrize("side", [8, 16, 28, 32])
def test_digits_are_resized_as_ever(tmp_path: Path, side: int) -> None:
    splits = load_splits(DataSpec(img_size=side, in_chans=1, train_images=40), tmp_path)
    seen = {image.numpy().tobytes() for image in splits.train.pixels}
    pixels = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    fitted = (ImageOps.fit(Image.fromarray(p), (side, side), Image.Resampling.BILINEAR) for p in pixels)
    assert len(seen & {np.asarray(image).tobytes() for image in fitted}) == len(seen) == 40


def test_images_of_one_colour_are_told(tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    root = write("", cat=6, dog=6)
    for index in range(6):
        Image.new("RGB", (9, 9), (index, 7, 7)).save(root / "dog" / f"{index}.png")
    Image.new("L", (9, 9), 0).save(root / "cat" / "0.png")
    with caplog.at_level(logging.WARNING):
        load_splits(folder_spec(root), tmp_path / "cache")
    (line,) = caplog.messages
    assert "7 of 12 images have one colour alone, among them all of the class 'dog'" in line


def test_originals_are_the_training_images_whole(tmp_path: Path, write: Write) -> None:
    write("train", size=(60, 40), cat=5, dog=3)
    root = write("train", size=(400, 20), emu=3)
    splits = load_splits(replace(folder_spec(root, img_size=16), originals=1.5), tmp_path / "cache")
    assert splits.originals is not None
    assert len(splits.originals) == len(splits.train)
    sizes = {name: set() for name in splits.class_names}
    for index, label in enumerate(splits.train.labels.tolist()):
        image = splits.originals.image(index)
        sizes[splits.class_names[label]].add(image.size)
        # in the order of the training images: cropped and resized, an original is nearly the image
        again = ImageOps.fit(image, (16, 16), Image.Resampling.BILINEAR)
        pixels = splits.train.pixels[index].permute(1, 2, 0)
        assert np.corrcoef(np.asarray(again).flatten(), pixels.flatten())[0, 1] > 0.6
    assert sizes == {"cat": {(36, 24)}, "dog": {(36, 24)}, "emu": {(40, 20)}}
    assert splits.originals.bytes == sum(
        3 * int(np.prod(splits.originals.image(index).size)) for index in range(len(splits.originals))
    )


def test_originals_are_smaller_or_left_out_where_memory_ends(tmp_path: Path, write: Write) -> None:
    root = write("train", size=(60, 60), cat=9, dog=9)
    spec = replace(folder_spec(root, img_size=20, in_chans=1), originals=2.0)
    sides = []
    for limit in (1 << 20, 10 * 4 * 30 * 30 // 3 + 1, 1000):
        originals = load_splits(replace(spec, originals_bytes=limit), tmp_path / "cache").originals
        sides.append(originals and originals.image(0).size)
    assert sides == [(40, 40), (30, 30), None]


def test_images_of_sixteen_bits_keep_their_greys(tmp_path: Path) -> None:
    greys = np.arange(144).reshape(12, 12)
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(4):
            Image.fromarray((greys * 257).astype(np.uint16)).save(tmp_path / "images" / label / f"{index}.png")
    splits = load_splits(folder_spec(tmp_path / "images", img_size=12, in_chans=1), tmp_path / "cache")
    assert all(np.array_equal(image[0], greys) for image in splits.train.pixels.numpy())


def test_a_folder_without_images_is_no_class(tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    write("", cat=4, dog=4)
    (tmp_path / "images" / "emu").mkdir()
    (tmp_path / "images" / ".cache").mkdir()
    with caplog.at_level(logging.WARNING):
        assert load_splits(folder_spec(tmp_path / "images"), tmp_path / "cache").class_names == ("cat", "dog")
    assert "the folder 'emu' of" in caplog.text
    assert ".cache" not in caplog.text


def test_a_class_without_training_images_is_named(tmp_path: Path, write: Write) -> None:
    write("train", cat=4, dog=4)
    with pytest.raises(DataError, match=r"the class 'emu' has images in .* but no images in train"):
        load_splits(folder_spec(write("test", cat=2, emu=1)), tmp_path / "cache")


def test_too_few_images_of_a_class_are_named(tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match=r"the class 'dog' .* has 2 training images, at least 3"):
        load_splits(folder_spec(write(".", cat=9, dog=2)), tmp_path / "cache")


def test_a_test_folder_needs_a_train_folder(tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match="has a folder 'test' but none of train, training"):
        load_splits(folder_spec(write("test", cat=9)), tmp_path / "cache")


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    _write_mnist(raw, "train", 60)
    _write_mnist(raw, "t10k", 20)
    labels = raw / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([77]))
    with pytest.raises(DataError, match="has the label 77 in train, but only the classes 0–9"):
        load_splits(DataSpec(dataset="torch/fashion_mnist", data_dir=str(tmp_path)), tmp_path / "cache")


def test_an_unwritable_cache_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        load_splits(DataSpec(img_size=8, in_chans=1), tmp_path / "file" / "cache")


def test_images_must_fit_together() -> None:
    with pytest.raises(DataError, match="must be N×C×H×W uint8"):
        Images(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), (0.5,), (0.5,))
    with pytest.raises(DataError, match="1 channels need as many means"):
        Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(DataError, match="1 channels need as many means"):
        Images(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), (0.5,), (float("nan"),))
    with pytest.raises(DataError, match=r"labels must be int64 and count from 0, got torch.int64 from -1"):
        Images(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.tensor([-1]), (0.5,), (0.5,))
    with pytest.raises(DataError, match="0 images"):
        Images(torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), (0.5,), (0.5,))
