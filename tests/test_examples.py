"""Every file of examples/ runs, with tiny settings; the Python of README and docs runs as it stands."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pytest
import servers
import timm
import torch
from PIL import Image
from test_documents import SHORT, write_hub, write_images
from torch import nn

import nas_kd
from nas_kd.__main__ import main
from nas_kd.networks.int8 import quantise
from nas_kd.search.storage import close_storage, open_storage

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
FEW = "width=0.5/1"  # choices of each block
TINY = [*SHORT["study"].split(), *f"--no-base-bounds --no-search-stages --space {FEW} --model test_resnet".split()]
RESULT = "results/resnet18-digits-params1M/resnet18-0.09M-99.2"  # as the documents name one


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which an export lies where the documents say, with its ONNX file."""
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    card = nas_kd.Card(
        input_size=(3, 64, 64), crop_pct=0.875, interpolation="bicubic", label_names=("cat", "dog", "owl")
    )
    nas_kd.export(timm.create_model("test_resnet", num_classes=3).eval(), folder / RESULT, card, onnx=True)
    return folder


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python example in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def typed(name: str, *arguments: str, folder: Path) -> list[str]:
    """What the shell gives to `nas-kd` when it runs an example."""
    command = folder / "nas-kd"
    command.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    command.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(EXAMPLES / name), *arguments], env={"PATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_they_are_all_listed() -> None:
    files = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".sh")}
    assert set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))) == files


def test_own_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_loop.py", "--trials", "1", "--epochs", "1", "--out", str(tmp_path / "small"), monkeypatch=monkeypatch)
    assert re.search(r"teacher: [\d.]+%\nstudent: [\d.]+%", capsys.readouterr().out)
    whole = sum(p.numel() for p in timm.create_model("test_resnet", in_chans=1, num_classes=10).parameters())
    assert sum(p.numel() for p in nas_kd.load(tmp_path / "small").parameters()) < whole


def test_backbone(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("backbone.py", str(place / RESULT), "--steps", "2", monkeypatch=monkeypatch)
    assert re.fullmatch(r"step 0: loss [\d.]+\nstep 1: loss [\d.]+\n", capsys.readouterr().out)


def test_device_latency(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("device_latency.py", str(place / RESULT / "model.onnx"), monkeypatch=monkeypatch)
    assert float(capsys.readouterr().out) > 0


def test_onnx_inference_needs_no_torch(place: Path) -> None:
    """And its logits are those of timm's model behind timm's transform."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC).save(place / "photo.png")
    program = "import runpy, sys; runpy.run_path(sys.argv[0]); assert 'torch' not in sys.modules"

    def told(*more: str) -> dict[str, float]:
        words = [str(EXAMPLES / "onnx_inference.py"), str(place / RESULT), "photo.png", *more]
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.argv = {words!r}; {program}"],
            cwd=place,
            capture_output=True,
            text=True,
            check=True,
        )
        return {name: float(value) for name, value in (line.split(": ") for line in done.stdout.splitlines())}

    model = nas_kd.load(place / RESULT).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = transform(Image.open(place / "photo.png"))[None]
    found, logits = told(), dict(zip(("cat", "dog", "owl"), model(image)[0].tolist(), strict=True))
    assert found == pytest.approx(logits, abs=0.002)
    assert list(found) == sorted(found, key=lambda name: -found[name])
    quantise(place / RESULT / "model.onnx", image, place / RESULT / "model.int8.onnx")
    assert told("model.int8.onnx") == pytest.approx(logits, abs=0.1 * max(map(abs, logits.values())))


def test_own_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "my_images", 64)
    write_hub(tmp_path / "hub", "test_resnet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    words = typed("own_photos.sh", str(tmp_path / "my_images"), "--out", str(tmp_path / "out"), folder=tmp_path)
    assert main([*words, *TINY, "--img-size", "32", "--space", "width=0.25/0.5/1"]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


@contextlib.contextmanager
def database(folder: Path) -> Iterator[str]:
    """PostgreSQL where it is installed."""
    if servers.postgres_folder() is None:
        yield f"sqlite:///{folder / 'server.db'}"
    else:
        with servers.postgres() as server:
            yield server.url


def test_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = typed("several_machines.sh", "study", str(tmp_path / "store"), folder=tmp_path)
    worker = typed("several_machines.sh", "worker", "--out", str(tmp_path / "worker"), folder=tmp_path)
    with database(tmp_path) as url:
        monkeypatch.setenv("NAS_KD_STORAGE", url)
        assert main([*study, *TINY, "--out", str(tmp_path / "out")]) == 0
        shutil.rmtree(tmp_path / "out")  # as on a machine that has the database and the store alone
        assert main([*worker, *SHORT["worker"].split()]) == 0
        storage = open_storage(url)
        assert [study.study_name for study in storage.get_all_studies()] == ["shared"]
        close_storage(storage)


def documented() -> list[tuple[str, str]]:
    """(document, its blocks of Python, one after the other) of README and docs."""
    found = []
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
        if blocks and document.name != "README.md":  # tests/test_library.py runs that one
            found.append((document.name, "\n".join(blocks)))
    return found


@pytest.mark.parametrize(("document", "code"), documented())
def test_python_of_the_documents_runs(document: str, code: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def my_own_training(network: nn.Module, epochs: int) -> float:
        return float(network(torch.randn(2, 1, 16, 16)).detach().std())  # what a reader puts here

    pixels = torch.randint(0, 256, (192, 1, 16, 16), dtype=torch.uint8)
    images = nas_kd.Images(pixels, torch.arange(192) % 10, (0.5,), (0.5,))
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place / RESULT))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # the documents' base is too large for a test that trains nothing
    code = code.replace('"resnet18"', '"test_resnet"').replace("params=1M", "params=50%")
    code = code.replace("img_size=16)", f"img_size=16, options=nas_kd.parse_options({FEW!r}))")
    code = code.replace("LibrarySpec()", "LibrarySpec(images=64, holdout=32, rounds=(2,), batch_size=16)")
    exec(compile(code, document, "exec"), {"my_own_training": my_own_training, "images": images})
