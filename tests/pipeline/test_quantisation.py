"""A network as int8, on real digits: measured, and brought back where calibration alone loses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages
from nas_kd.data.splits import DataSpec, Splits, load_splits
from nas_kd.pipeline.quantisation import (
    FLOAT,
    INT8,
    RECORD,
    WEIGHTS,
    Int8Spec,
    MeasuredFile,
    Quantised,
    quantise_network,
    quantised_once,
)
from nas_kd.quantize import main
from nas_kd.results.export import Card, export
from nas_kd.training.evaluation import evaluate
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe

_USUAL = Int8Spec()
_LOUD = 200.0  # times the others
PLAIN = Augmentation(shift=0, flip=False)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load_splits(DataSpec(img_size=16, in_chans=1), tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def network(splits: Splits) -> nn.Module:
    """A small network that knows the digits."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    model = nn.Sequential(*layers)
    train(model, AugmentedImages(splits.train, PLAIN), Recipe(epochs=6, lr=0.05, distill_weight=0.0))
    return model


def run(network: nn.Module, splits: Splits, folder: Path, spec: Int8Spec = _USUAL) -> Quantised:
    folder.mkdir()
    return quantise_network(network, splits, folder, spec, AugmentedImages(splits.train, PLAIN))


def test_both_forms_are_measured_as_they_are(network: nn.Module, splits: Splits, tmp_path: Path) -> None:
    result = run(network, splits, tmp_path / "out")
    assert result.exact.test_accuracy == pytest.approx(evaluate(network, splits.test))
    assert abs(result.int8.test_accuracy - result.exact.test_accuracy) < 0.02
    assert not result.recovered
    assert {path.name for path in (tmp_path / "out").iterdir()} == {FLOAT, INT8, RECORD}
    assert result.int8.bytes == (tmp_path / "out" / INT8).stat().st_size < 0.5 * result.exact.bytes
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["int8"]["test_accuracy"] == result.int8.test_accuracy
    assert record["deploy"] == result.deploy.file


def test_a_loss_is_trained_away(network: nn.Module, splits: Splits, tmp_path: Path) -> None:
    """Some channels far louder than the others take the whole range of int8: the same function in float."""
    loud = copy.deepcopy(network)
    with torch.no_grad():
        for name, tensor in loud.named_parameters():
            if name.startswith("0."):
                tensor[:4] *= _LOUD
            elif name == "2.weight":
                tensor[:, :4] /= _LOUD
    calibrated = run(loud, splits, tmp_path / "calibrated", Int8Spec(recover=False))
    assert calibrated.calibration_loss > 0.02
    assert {layer.module for layer in calibrated.worst} == {"0", "2", "5"}
    assert calibrated.worst[0].module == "2"  # which reads them
    result = run(loud, splits, tmp_path / "recovered")
    assert result.recovered
    assert result.calibration_loss == calibrated.calibration_loss
    assert result.int8.test_accuracy > calibrated.int8.test_accuracy
    assert (tmp_path / "recovered" / WEIGHTS).exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    card = Card(input_size=(1, 16, 16), mean=(0.3,), std=(0.4,))
    return export(model, tmp_path_factory.mktemp("export") / "model", card)


def test_the_command_writes_beside_an_export(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(exported),
        "--train-images",
        "40",
        "--calibration-images",
        "8",
        "--no-recover",
        "--keep-float",
        "fc",
    ]
    assert main([*arguments, "-q"]) == 0
    told = capsys.readouterr().out
    assert {FLOAT, INT8, RECORD, "config.json"} <= {path.name for path in exported.iterdir()}
    for words in (FLOAT, INT8, "deploy", "hurts most"):
        assert words in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet18"], "resnet18 has no weights"),
        (["EXPORT", "--data-dir", "nowhere"], "no data folder nowhere"),
        (["EXPORT", "--keep-float", "layre1*"], "no layer of the network is named 'layre1*'"),
        (["EXPORT", "--initial-checkpoint", "nothing.pth"], "nothing.pth"),
    ],
)
def test_mistakes_are_one_line(
    exported: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    given = [str(exported) if word == "EXPORT" else word for word in arguments]
    assert main([*given, "--train-images", "40", "-q"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_other_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("test_resnet", in_chans=1, num_classes=3)
    folder = export(model, tmp_path / "model", Card(input_size=(1, 16, 16), mean=(0.3,), std=(0.4,)))
    assert main([str(folder), "-q"]) == 2
    assert "tells 3 classes apart, there are 10" in capsys.readouterr().err


def test_nothing_is_made_twice_and_what_is_damaged_again(
    network: nn.Module, splits: Splits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, images = Int8Spec(calibration_images=20, recover=False), AugmentedImages(splits.train, PLAIN)
    first, files = quantised_once(network, splits, tmp_path, spec, images)
    assert [path.name for path in files] == [FLOAT, INT8, RECORD]
    written = [path.stat().st_mtime_ns for path in files]
    assert quantised_once(network, splits, tmp_path, spec, images) == (first, files)
    assert [path.stat().st_mtime_ns for path in files] == written
    files[2].write_text(files[2].read_text()[:40])  # a record that was cut off
    again, _ = quantised_once(network, splits, tmp_path, spec, images)
    assert "damaged" in caplog.text
    assert again.int8.test_accuracy == first.int8.test_accuracy
    files[1].unlink()
    assert quantised_once(network, splits, tmp_path, spec, images)[0].int8.bytes == files[1].stat().st_size
    quantised_once(network, splits, tmp_path, Int8Spec(calibration_images=19, recover=False), images)
    assert len(list(tmp_path.iterdir())) == 2


def test_int8_is_to_be_deployed_where_it_is_faster_and_as_good() -> None:
    fast, slow = (MeasuredFile(file=f"{ms}", test_accuracy=0.9, bytes=10, milliseconds=ms) for ms in (1.0, 2.0))
    facts = {"worst": (), "calibration_loss": 0.0, "recovered": False}
    assert Quantised(exact=slow, int8=fast, loss=0.005, **facts).deploy is fast
    assert Quantised(exact=slow, int8=fast, loss=0.02, **facts).deploy is slow
    assert Quantised(exact=fast, int8=slow, loss=-0.01, **facts).deploy is fast
