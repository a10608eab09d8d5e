"""A result on a microcontroller: what needs the interpreter is marked mcu, `pytest -m mcu`."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from nas_kd import mcu, quantize, study
from nas_kd.arguments.study import parse_study
from nas_kd.budget import ACCELERATOR, ON_DEVICE, Cost, parse_budget
from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages
from nas_kd.data.splits import DataSpec, Splits, load_splits
from nas_kd.errors import ModelError
from nas_kd.networks.micro import MicroInterpreter, compile_file
from nas_kd.pipeline.device import RECORD, TFLITE, compared, write_measured
from nas_kd.pipeline.models import Model, on_device
from nas_kd.pipeline.quantisation import INT8, Int8Spec, quantised_once
from nas_kd.preparation.job import choices_made
from nas_kd.preparation.opening import bound_space, open_space
from nas_kd.results.export import Card, export
from nas_kd.results.refine import Refined
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe

SIZE = (1, 32, 32)
PLAIN = Augmentation(shift=0, flip=False)
SMALL = (
    "--model test_resnet --img-size 32 --teacher-epochs 1 --proxy-epochs 1 --refine-epochs 1 --train-images 120"
    " --no-onnx --space width=0.25/0.5/1,kernel,conv=standard/depthwise --no-search-stages --no-base-bounds"
)


def created(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    return network


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find, hidden = importlib.util.find_spec, ("tflite_micro", "ethosu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder without an int8 file."""
    export(created(), tmp_path / "result", Card(input_size=SIZE))
    return tmp_path / "result"


def test_a_folder_without_int8_is_told_how_to_get_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mcu.main([str(folder)]) == 2
    assert (
        f"there is no {INT8} in {folder}: write it with python -m nas_kd.quantize {folder}" in capsys.readouterr().err
    )


def test_no_folder_and_no_such_accelerator(capsys: pytest.CaptureFixture[str]) -> None:
    assert mcu.main(["nowhere"]) == 2
    assert "there is no exported model in nowhere" in capsys.readouterr().err
    assert mcu.main(["nowhere", "--accelerator", "ethos-u1"]) == 2
    assert "invalid choice: 'ethos-u1'" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_extra_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / INT8).write_bytes(b"never read")
    assert mcu.main([str(folder)]) == 2
    words = capsys.readouterr().err
    assert words == "nas_kd: microcontrollers need tflite-micro and ethos-u-vela: pip install 'nas-kd[mcu]'\n"


@pytest.mark.usefixtures("nothing_installed")
def test_a_study_says_that_its_figures_are_the_closed_form(caplog: pytest.LogCaptureFixture) -> None:
    settings = parse_study([*SMALL.split(), "--budget", "ram=100%,flash=50%"])
    space = open_space(settings, created())
    with caplog.at_level(logging.WARNING):
        space = bound_space(space, settings)
    assert caplog.messages == [
        "flash and ram are those of the closed form: pip install 'nas-kd[mcu]' to have them measured"
    ]
    assert space.budget is not None
    assert "device" in choices_made(settings, space.budget)
    assert on_device((), space.budget) == []


def test_int8_counts_both_without_a_bound() -> None:
    settings = parse_study([*SMALL.split(), "--budget", "params=50%", "--int8"])
    space = open_space(settings, created())
    space = bound_space(space, settings)
    assert space.base_cost().flash > 0
    assert space.base_cost().ram > 0


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load_splits(DataSpec(img_size=32, in_chans=1), tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def network(splits: Splits) -> nn.Module:
    model = created()
    train(model, AugmentedImages(splits.train, PLAIN), Recipe(epochs=2, lr=0.05, distill_weight=0.0))
    return model


@pytest.mark.mcu
def test_a_result_from_its_folder_to_the_device(
    network: nn.Module, splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "result"
    export(network, folder, Card(input_size=SIZE, mean=splits.mean, std=splits.std))
    assert quantize.main([str(folder), "-q"]) == 0
    capsys.readouterr()
    assert mcu.main([str(folder), "--images", "40", "--c", str(tmp_path / "c"), "-q"]) == 0
    assert (tmp_path / "c" / "Makefile").is_file()
    words, record = capsys.readouterr().out, json.loads((folder / RECORD).read_text())
    assert record["bytes"] == (folder / TFLITE).stat().st_size
    assert record["arena"]["total"] == MicroInterpreter(folder / TFLITE).arena().total
    assert f"ram {record['arena']['total']:,} bytes" in words
    assert record["answers"]["same"] >= 0.9
    assert record["answers"]["accuracy"] == pytest.approx(record["answers"]["onnx_accuracy"], abs=0.05)
    assert record["operators"]["CONV_2D"] == 15
    assert record["compiled"]["cpu_operators"] == 0
    assert f"{record['compiled']['cycles']:,} cycles" in words


@pytest.mark.mcu
def test_answers_of_another_network_are_noticed(network: nn.Module, splits: Splits, tmp_path: Path) -> None:
    spec, images = Int8Spec(recover=False), AugmentedImages(splits.train, PLAIN)
    (_, files), (_, others) = (quantised_once(own, splits, tmp_path, spec, images) for own in (network, created(1)))
    write_measured(files[1].parent)
    interpreter = MicroInterpreter(files[1].with_name(TFLITE))
    assert compared(interpreter, files[1], splits.test[:40]).same >= 0.9
    with pytest.raises(ModelError, match=r"answers otherwise than model.int8.onnx on \d+% of 40 images"):
        compared(interpreter, others[1], splits.test[:40])


@pytest.mark.mcu
def test_what_is_over_as_measured_is_left_out(
    network: nn.Module, splits: Splits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    int8 = quantised_once(network, splits, tmp_path, Int8Spec(recover=False), AugmentedImages(splits.train, PLAIN))
    truth = write_measured(int8[1][1].parent, ACCELERATOR)
    refined = Refined(network=network, val_accuracy=0.5, test_accuracy=0.5)
    cost = Cost(params=1, macs=1, flash=1, ram=1, cycles=1)  # far too hopeful
    models = [Model(role=role, genotype=None, cost=cost, refined=refined, int8=int8) for role in ("teacher", "front")]
    kept = on_device(models, parse_budget(f"ram={truth['ram']},flash={truth['flash']},params=1"))
    assert [{kind: model.cost[kind] for kind in ON_DEVICE} for model in kept] == [truth] * 2
    assert kept[1].int8 is not None
    assert kept[1].int8[1][-1].name == TFLITE
    for kind in ON_DEVICE:
        kept = on_device(models, parse_budget(f"{kind}={truth[kind] - 1}"))
        assert [model.role for model in kept] == ["teacher"]
        assert f"left out, as measured it is over budget: {kind}" in caplog.text


@pytest.mark.mcu
def test_a_study_within_ram_flash_and_cycles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    budget = "ram=32KB,flash=64KiB,cycles=50%"
    assert (
        study.main([*SMALL.split(), "--budget", budget, "--trials", "2", "--front", "1", "--out", str(out), "-q"]) == 0
    )
    words = capsys.readouterr().out
    assert "within 32K bytes of RAM and 65.54K bytes of flash" in words
    assert "cycles of the accelerator" in words
    with (out / "front.csv").open() as file:
        every = list(csv.DictReader(file))
    rows = [row for row in every if row["role"] == "front"]
    (base,) = (row for row in every if row["role"] == "teacher")
    assert rows
    for row in rows:
        folder = out / row["path"]
        assert int(row["flash"]) == (folder / TFLITE).stat().st_size <= 65_536
        assert int(row["cycles"]) == compile_file(folder / TFLITE, ACCELERATOR).cycles <= 0.5 * int(base["cycles"])
        assert int(row["ram"]) == MicroInterpreter(folder / TFLITE).arena().total <= 32_000
