"""Photos through the commands: what is exported says how its accuracy was measured, to the image."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import nas_kd
from nas_kd import distill, study
from nas_kd.arguments.study import parse_study
from nas_kd.data.preprocessing import Preprocessing
from nas_kd.data.splits import DataSpec, load_splits
from nas_kd.networks.onnx import run_onnx
from nas_kd.preparation.job import prepare
from nas_kd.search.storage import close_storage

BUDGET = "--budget macs=50% --no-base-bounds"
QUICK = "--train-images 40 --seed 0 -q --device cpu --data-dir"
CLASSES = ("dark", "light")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that are hard to tell apart, in all sizes and kinds of files."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for part, count in (("train", 40), ("test", 30)):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                height, width = generator.integers(66, 110, 2)
                pixels = generator.normal(118 + 24 * label, 60, (height, width, 3)).clip(0, 255).astype(np.uint8)
                save(Image.fromarray(pixels), root / part / name, index)
    return root


def save(image: Image.Image, folder: Path, index: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1 + index % 8
    if index % 3:
        image.save(folder / f"{index}.jpg", exif=exif)
    else:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(folder / f"{index}.png")


def transformed(root: Path, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images and labels of the test files, opened by us and then transformed as timm says for the model."""
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    files = [(file, label) for label, name in enumerate(CLASSES) for file in (root / "test" / name).iterdir()]
    images = torch.stack([transform(nas_kd.open_picture(file).convert(mode)) for file, _ in files])
    return images, torch.tensor([label for _, label in files])


def seen_by_timm(root: Path, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits and labels of the test files."""
    images, labels = transformed(root, model)
    with torch.inference_mode():
        return model.eval()(images), labels


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return round((logits.argmax(1) == labels).double().mean().item(), 4)


def test_a_study_exports_what_it_measured(photos: Path, tmp_path: Path) -> None:
    effort = "--trials 1 --proxy-epochs 1 --refine-epochs 1 --teacher-epochs 1 --front 1 --library-budget 0 --int8"
    effort += " --no-base-bounds --no-search-stages --space width=0.5/1"
    arguments = f"--model test_resnet --budget macs=50% --img-size 64 {effort} {QUICK} {photos} --out {tmp_path}"
    assert study.main(arguments.split()) == 0
    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    assert len({row["test_accuracy"] for row in rows}) > 1  # or it says little
    for row in rows:
        model = nas_kd.load(tmp_path / row["path"])
        config = timm.data.resolve_model_data_config(model)
        assert (config["crop_pct"], config["interpolation"]) == (0.95, "bilinear")  # test_resnet's own
        assert accuracy(*seen_by_timm(photos, model)) == float(row["test_accuracy"])
        if row["role"] == "front":
            images, labels = transformed(photos, model)
            int8 = run_onnx(tmp_path / row["path"] / "model.int8.onnx", images)
            assert accuracy(int8, labels) == float(row["int8_test_accuracy"])


@pytest.mark.parametrize("more", ["--in-chans 1 --crop-pct 0.8 --interpolation bilinear", "--img-size 48"])
def test_a_training_exports_what_it_measured(photos: Path, tmp_path: Path, more: str) -> None:
    arguments = f"test_resnet --no-teacher --img-size 64 --epochs 1 {QUICK} {photos} --out {tmp_path} {more}"
    assert distill.main(arguments.split()) == 0
    record = json.loads((tmp_path / "distill.json").read_text())
    folder = tmp_path / record["path"]
    model = nas_kd.load(folder)
    logits, labels = seen_by_timm(photos, model)
    assert accuracy(logits, labels) == record["test accuracy"]
    config = timm.data.resolve_model_data_config(model)
    tiny = "48" in more
    assert (config["crop_pct"], config["interpolation"]) == ((1.0, "bilinear") if tiny else (0.8, "bilinear"))
    assert "open_picture(FILE)" in (folder / "README.md").read_text()
    images = read(folder)
    assert {name: as_list(images[name]) for name in config} == {name: as_list(value) for name, value in config.items()}


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read(folder: Path) -> dict[str, Any]:
    """The images of `model.py`, which needs no nas_kd."""
    spec = importlib.util.spec_from_file_location("exported", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images: dict[str, Any] = module.IMAGES
    return images


def test_logits_are_the_same_as_those_of_the_cached_images(photos: Path, tmp_path: Path) -> None:
    preprocessing = Preprocessing(crop_pct=0.875, interpolation="bicubic")
    spec = DataSpec(data_dir=str(photos), img_size=64, preprocessing=preprocessing)
    splits = load_splits(spec, tmp_path / "cache")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=2)
    card = nas_kd.Card(
        input_size=(3, 64, 64), mean=splits.mean, std=splits.std, crop_pct=0.875, interpolation="bicubic"
    )
    model = nas_kd.load(nas_kd.export(network, tmp_path / "out", card))
    logits, labels = seen_by_timm(photos, model)
    pixels = splits.test.pixels.float()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (splits.mean, splits.std))
    with torch.inference_mode():
        ours = model.eval()((pixels - mean) / std)
    order = torch.tensor(sorted_as_listed(photos, splits.test.labels))
    torch.testing.assert_close(ours[order], logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(splits.test.labels[order], labels)


def sorted_as_listed(root: Path, labels: Tensor) -> list[int]:
    """For each test file in the order in which the folder lists it, its place among the test images."""
    numbers = {}
    for label, name in enumerate(CLASSES):
        start = int((labels < label).sum())
        files = sorted((root / "test" / name).iterdir(), key=lambda file: int(file.stem))
        numbers |= {file: start + place for place, file in enumerate(files)}
    return [numbers[file] for name in CLASSES for file in (root / "test" / name).iterdir()]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"cat": 9}, "images of one class, 'cat'"),
        ({"cat": 9, "dog": 1}, "the class 'dog' of .* has 1 training image, at least 3 are needed"),
        ({"train/cat": 9, "train/dog": 1, "val/cat": 2, "test/dog": 2}, "has 1 training image, at least 2"),
        ({"train/cat": 9, "test/cat": 2}, "images of one class, 'cat'"),
    ],
)
def test_too_little_is_one_line_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], counts: dict[str, int], said: str
) -> None:
    for name, count in counts.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "images" / name / f"{index}.png")
    arguments = f"--model test_resnet --budget macs=50% --data-dir {tmp_path / 'images'} --out {tmp_path / 'out'}"
    assert study.main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)


def save_weights(place: Path, names: Sequence[str]) -> Path:
    """Images of some classes, and a checkpoint with as many outputs."""
    for name in names:
        (place / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (8, 8), (index, 9, 0)).save(place / "images" / name / f"{index}.png")
    torch.save(timm.create_model("test_resnet", num_classes=len(names)).state_dict(), place / "weights.pth")
    return place / "images"


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        (("1", "2", "Zebra", "ant"), "", "1, 2, ant, Zebra: if .*weights.pth counts them .* 1, 2, Zebra, ant"),
        (("1", "10", "2"), "", "1, 2, 10: if .*1, 10, 2"),
        (("1", "10", "2"), " --class-map map.txt", ""),
        (("ant", "bee"), "", ""),
    ],
)
def test_a_checkpoint_of_another_order_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], more: str, said: str
) -> None:
    root = save_weights(tmp_path, names)
    (root / "map.txt").write_text("\n".join(names))
    given = f"--model test_resnet {BUDGET} --img-size 32 --initial-checkpoint {tmp_path}/weights.pth"
    job = prepare(parse_study(f"{given} --data-dir {root} --out {tmp_path}/out{more}".split()))
    close_storage(job.storage)
    assert bool(caplog.messages) == bool(said)
    assert re.search(said, caplog.text)


def test_an_exported_model_of_another_order_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = save_weights(tmp_path, ("bee", "ant", "cat"))
    card = nas_kd.Card(input_size=(3, 32, 32), label_names=("cat", "bee", "ant"))
    folder = nas_kd.export(timm.create_model("test_resnet", num_classes=3), tmp_path / "exported", card)
    given = f"--model local-dir:{folder} --pretrained {BUDGET} --data-dir {root} --out {tmp_path}/out"
    close_storage(prepare(parse_study(given.split())).storage)
    assert "has the classes in the order cat, bee, ant, the images in the order ant, bee, cat" in caplog.text


def test_a_pretrained_stem_for_greys_gets_the_average_normalisation(tmp_path: Path) -> None:
    root = save_weights(tmp_path, ("ant", "bee"))
    torch.save(timm.create_model("resnet10t", num_classes=2, in_chans=1).state_dict(), tmp_path / "grey.pth")
    given = f"--model resnet10t --in-chans 1 {BUDGET} --img-size 32 --initial-checkpoint {tmp_path}/grey.pth"
    job = prepare(parse_study(f"{given} --data-dir {root} --out {tmp_path}/out".split()))
    close_storage(job.storage)
    assert (job.data.mean, job.data.std) == (pytest.approx((0.449,), abs=1e-4), pytest.approx((0.226,), abs=1e-4))
