"""int8 TensorFlow Lite files in the interpreter of microcontrollers: `pytest -m mcu`, with the extra `mcu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import nas_kd.models  # noqa: F401  registers the CIFAR models
from nas_kd.budget import ACCELERATOR
from nas_kd.costs.device import device_cost
from nas_kd.costs.draft import drafted
from nas_kd.errors import ModelError
from nas_kd.networks.convolutions import ConvSpec, build_conv
from nas_kd.networks.int8 import quantise
from nas_kd.networks.micro import Estimator, MicroInterpreter, compile_file
from nas_kd.networks.onnx import run_onnx, write_model
from nas_kd.networks.tflite import write_tflite
from nas_kd.networks.tflite_file import operators_of

pytestmark = pytest.mark.mcu
SIZE = (3, 32, 32)
Files = tuple[Path, Path]


class Mixed(nn.Module):
    """Kinds of convolutions of ours, parts put together, a pooling whose border is padded."""

    def __init__(self) -> None:
        super().__init__()
        spec = {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1}
        kinds = ("shift", "depthwise", "blueprint", "group4")
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.kinds = nn.ModuleList(build_conv(ConvSpec(kind=kind, **spec)) for kind in kinds)  # type: ignore[arg-type]
        self.pool, self.average = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)
        self.act, self.fc = nn.Hardswish(), nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        parts = [kind(x).relu() for kind in self.kinds]
        return self.fc(self.average(self.pool(torch.cat(parts, 1))).flatten(1))


def networks() -> dict[str, Callable[[], nn.Module]]:
    names = ("cifar_resnet20", "test_resnet", "test_efficientnet", "tf_efficientnet_lite0", "mobilenetv3_small_050")
    return {"mixed": Mixed, **{name: lambda name=name: timm.create_model(name, num_classes=10) for name in names}}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=networks())
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = networks()[request.param]().eval()
    for module in model.modules():  # what timm begins with at zero would be layers of nothing
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


@pytest.fixture(scope="module")
def files(network: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("micro")
    write_model(network, SIZE, folder / "model.onnx")
    quantise(folder / "model.onnx", images, folder / "int8.onnx")
    write_tflite(folder / "int8.onnx", folder / "int8.tflite")
    return folder / "int8.onnx", folder / "int8.tflite"


def test_the_interpreter_is_as_near_to_float_as_onnx_runtime(network: nn.Module, files: Files, images: Tensor) -> None:
    with torch.no_grad():
        exact = network(images).numpy()
    answers, expected = MicroInterpreter(files[1]).run(images.numpy()), run_onnx(files[0], images).numpy()
    lost = [float(np.linalg.norm(own - exact) / np.linalg.norm(exact)) for own in (answers, expected)]
    assert lost[0] < 1.2 * lost[1] + 0.01
    assert np.linalg.norm(answers - expected) < 0.1 * np.linalg.norm(expected)


def test_the_closed_form_is_what_the_interpreter_takes(network: nn.Module, files: Files) -> None:
    cost, arena = device_cost(network, SIZE), MicroInterpreter(files[1]).arena()
    assert arena.total == arena.head + arena.tail
    # of parts that are put together one is not rounded anew, and which is not known before
    apart = 0.1 if isinstance(network, Mixed) else 0.01
    assert cost.ram == pytest.approx(arena.total, rel=apart)
    assert cost.flash == pytest.approx(files[1].stat().st_size, rel=apart)


def test_nothing_is_left_to_the_processor_beside_an_accelerator(files: Files) -> None:
    compiled = compile_file(files[1], "ethos-u55-128")
    assert compiled.cpu_operators == 0
    assert compiled.cycles > 0
    assert compiled.sram > 0


def test_a_draft_has_the_operators_and_nearly_the_cycles_of_the_file(network: nn.Module, files: Files) -> None:
    draft, estimator = drafted(network, SIZE), Estimator(ACCELERATOR)
    real = estimator.cycles(files[1].read_bytes())
    together = isinstance(network, Mixed)  # of parts that are put together one is not rounded anew
    assert len(draft.modules) == sum(operators_of(files[1]).values()) + together
    assert sum(estimator.cycles(draft.content)) == pytest.approx(sum(real), rel=0.2 if together else 0.1)


def test_weights_are_within_the_flatbuffer_however_many(files: Files) -> None:
    """Behind it, as other converters put 256 KiB, the interpreter takes them for activations without an error."""
    from tflite_micro.tensorflow.lite.micro.python import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(files[1].read_bytes(), 0)
    assert all(buffer.offset == 0 and buffer.size == 0 for buffer in model.buffers)
    assert "TRANSPOSE" not in operators_of(files[1])


def test_an_arena_that_is_too_small_is_one_line(files: Files) -> None:
    with pytest.raises(ModelError, match=r"does not run .* in an arena of 2048 bytes: ") as error:
        MicroInterpreter(files[1], arena=2048)
    assert "\n" not in str(error.value)


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x.mean(1, keepdim=True), 3).flatten(1)


def test_operators_that_the_way_lacks_are_named(tmp_path: Path, images: Tensor) -> None:
    write_model(Foreign(), SIZE, tmp_path / "model.onnx")
    quantise(tmp_path / "model.onnx", images, tmp_path / "int8.onnx")
    with pytest.raises(ModelError, match=r"uses Softmax, which the way to TensorFlow Lite Micro lacks: it has Add"):
        write_tflite(tmp_path / "int8.onnx", tmp_path / "int8.tflite")


def test_layers_that_stay_float_are_refused(tmp_path: Path, images: Tensor) -> None:
    torch.manual_seed(0)
    write_model(timm.create_model("test_resnet", num_classes=10).eval(), SIZE, tmp_path / "model.onnx")
    quantise(tmp_path / "model.onnx", images, tmp_path / "int8.onnx", keep_float=("layer2.*",))
    with pytest.raises(ModelError, match=r"stays? float|no int8 weights"):
        write_tflite(tmp_path / "int8.onnx", tmp_path / "int8.tflite")


def test_a_file_that_is_none_is_refused_by_both(tmp_path: Path) -> None:
    path = tmp_path / "int8.tflite"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="does not run"):
        MicroInterpreter(path)
    with pytest.raises(ModelError, match="Vela cannot compile"):
        compile_file(path, "ethos-u55-128")
