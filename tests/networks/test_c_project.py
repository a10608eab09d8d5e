"""A result in C++: `pytest -m mcu`; where NAS_KD_TFLITE_MICRO names a folder with TensorFlow Lite Micro's sources and
those that it needs, as the README of such a folder says, it is built and run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import nas_kd.models  # noqa: F401  registers the CIFAR models
from nas_kd.costs.draft import drafted
from nas_kd.errors import OutputError
from nas_kd.networks.c_project import MARGIN, write_c
from nas_kd.networks.micro import MicroInterpreter
from nas_kd.networks.tflite_file import operators_of

pytestmark = pytest.mark.mcu
SIZE = (3, 32, 32)
SOURCES = os.environ.get("NAS_KD_TFLITE_MICRO")


@pytest.fixture(scope="module")
def tflite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("cifar_resnet20", num_classes=10).eval()
    path = tmp_path_factory.mktemp("c") / "model.tflite"
    path.write_bytes(drafted(network, SIZE).content)
    return path


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tflite: Path, image: np.ndarray) -> Path:
    write_c(tflite, image, tflite.parent / "c")
    return tflite.parent / "c"


def arrays(folder: Path) -> dict[str, list[int]]:
    found = re.findall(r"(\w+)\[\] = \{(.*?)\};", (folder / "model.cc").read_text(), re.DOTALL)
    return {name: [int(number) for number in numbers.split(",")] for name, numbers in found}


def test_the_folder_holds_the_file_an_image_and_its_outputs(tflite: Path, folder: Path, image: np.ndarray) -> None:
    held, interpreter = arrays(folder), MicroInterpreter(tflite)
    assert bytes(held["kModel"]) == tflite.read_bytes()
    rounded = interpreter.rounded(image[None])
    assert held["kInput"] == rounded.ravel().tolist()
    assert held["kOutput"] == interpreter.outputs(rounded).ravel().tolist()
    assert f"kArenaBytes = {interpreter.arena().total + MARGIN};" in (folder / "model.h").read_text()


def test_it_registers_the_operators_of_the_file_and_no_others(tflite: Path, folder: Path) -> None:
    text = (folder / "main.cc").read_text()
    registered = re.findall(r"resolver\.Add(\w+)\(\)", text)
    assert len(registered) == len(set(registered)) == len(operators_of(tflite))
    assert f"MicroMutableOpResolver<{len(registered)}>" in text
    assert {"Conv2D", "FullyConnected", "Mean", "Pad"} <= set(registered)


def test_a_folder_that_cannot_be_written_is_one_line(tflite: Path, image: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/c: .*; choose another folder"):
        write_c(tflite, image, tmp_path / "file" / "c")


@pytest.mark.skipif(SOURCES is None, reason="NAS_KD_TFLITE_MICRO names no sources of TensorFlow Lite Micro")
def test_it_is_built_and_answers_as_expected(folder: Path) -> None:
    subprocess.run(["make", "-j2", f"TFLITE_MICRO={SOURCES}"], cwd=folder, check=True, capture_output=True)
    done = subprocess.run(["./result"], cwd=folder, check=True, capture_output=True, text=True)
    assert "at most 0 steps from what is expected" in done.stdout
    model = folder / "model.cc"
    before, name, outputs = model.read_text().rpartition("kOutput[] = {\n")
    other = -1 - arrays(folder)["kOutput"][0]
    model.write_text(f"{before}{name}  {other},{outputs.partition(',')[2]}")
    subprocess.run(["make", f"TFLITE_MICRO={SOURCES}"], cwd=folder, check=True, capture_output=True)
    assert subprocess.run(["./result"], cwd=folder, check=False, capture_output=True).returncode == 1
