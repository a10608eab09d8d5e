from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from nas_kd.costs.latency import Timing
from nas_kd.costs.runtimes import LatencySpec, Runtime, Subject, default_runtime, measurer
from nas_kd.errors import DeviceError, NasKdError

QUICK = Timing(warmup=1, repeats=2, limit_s=0.05)


def subjects() -> dict[str, Subject]:
    image = torch.randn(2, 3, 16, 16)
    two = nn.Bilinear(4, 4, 2)
    return {
        "one": Subject(module=nn.Conv2d(3, 8, 3), arguments=(image,)),
        "other": Subject(module=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), arguments=(image,)),
        "two": Subject(module=two, arguments=(torch.randn(2, 4),), keywords={"input2": torch.randn(2, 4)}),
    }


def test_torch() -> None:
    threads = torch.get_num_threads()
    times = measurer(LatencySpec(runtime="torch", threads=2))(subjects(), QUICK)
    assert list(times) == ["one", "other", "two"]
    assert all(time.milliseconds > 0 for time in times.values())
    assert torch.get_num_threads() == threads


def test_onnx_runtime() -> None:
    given = {name: subject for name, subject in subjects().items() if name != "two"}
    times = measurer(LatencySpec(runtime="onnx"))(given, QUICK)
    assert list(times) == ["one", "other"]
    assert all(time.milliseconds > 0 for time in times.values())


def script(folder: Path, text: str) -> str:
    file = folder / "measure.py"
    file.write_text(text, encoding="utf-8")
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(file))}"


def test_a_command_of_the_users(tmp_path: Path) -> None:
    command = script(tmp_path, "import os, sys\nprint('a word first')\nprint(os.path.getsize(sys.argv[1]) / 1000)")
    times = measurer(LatencySpec(command=command))({"one": subjects()["one"]}, QUICK)
    assert 0.5 < times["one"].milliseconds < 100  # a small file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print('fast')", "printed 'fast': its last line must be the milliseconds"),
        ("print(-1)", "must be the milliseconds"),
        ("", "printed ''"),
        ("raise SystemExit('no device')", "failed with exit code 1: no device"),
    ],
)
def test_a_command_that_does_not_measure(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(NasKdError, match=message):
        measurer(LatencySpec(command=script(tmp_path, text)))({"one": subjects()["one"]}, QUICK)


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(NasKdError, match="cannot be run"):
        measurer(LatencySpec(command="no-such-command-anywhere"))({"one": subjects()["one"]}, QUICK)


def test_a_command_that_hangs(tmp_path: Path) -> None:
    command = script(tmp_path, "import signal\nsignal.pause()")
    with pytest.raises(NasKdError, match=r"took longer than 0\.5 s for one network: it hangs, or .*--latency-timeout"):
        measurer(LatencySpec(command=command, limit_s=0.5))({"one": subjects()["one"]}, QUICK)


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_layers_take_all_of_the_time(runtime: Runtime) -> None:
    network = timm.create_model("resnet10t", num_classes=10).eval()
    layers = tuple(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
    subject = Subject(module=network, arguments=(torch.randn(1, 3, 64, 64),), layers=layers)
    (measured,) = measurer(LatencySpec(runtime=runtime))({"one": subject}, QUICK).values()
    assert set(measured.layers) == set(layers)
    assert sum(measured.layers.values()) == pytest.approx(measured.milliseconds, rel=1e-6)
    assert len(list(network.modules())) > 40  # what is measured is a copy


def test_without_onnx_runtime_torch_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_runtime() == ("onnx", "")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    runtime, reason = default_runtime()
    assert runtime == "torch"
    assert "pip install onnx onnxruntime" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="no CUDA device"):
        measurer(LatencySpec(runtime="torch", device="cuda"))(subjects(), QUICK)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_on_a_gpu() -> None:
    times = measurer(LatencySpec(runtime="torch", device="cuda", batch=2))(subjects(), QUICK)
    assert all(time.milliseconds > 0 for time in times.values())


@pytest.mark.parametrize("change", [{"batch": 0}, {"threads": 0}])
def test_malformed(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="≥ 1"):
        LatencySpec(**change)  # type: ignore[arg-type]


def test_words() -> None:
    assert str(LatencySpec(runtime="torch")) == "torch on cpu, 1 image, 1 thread"
    assert str(LatencySpec(runtime="onnx", batch=8, threads=2)) == "ONNX Runtime on cpu, 8 images, 2 threads"
    assert str(LatencySpec(runtime="torch", device="cuda")) == "torch on cuda, 1 image"
