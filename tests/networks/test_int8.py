"""int8 files beside the float files that they were made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnxruntime.quantization.qdq_loss_debug import create_weight_matching
from torch import Tensor, nn

from nas_kd.errors import NasKdError
from nas_kd.networks.int8 import LayerError, module_of, quantise
from nas_kd.networks.onnx import run_onnx, write_model
from nas_kd.training.fake_quantisation import FrozenNorms, fake_quantised

SIZE = (3, 32, 32)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=10).eval()
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["test_resnet", "test_efficientnet", "tf_mobilenetv3_small_minimal_100"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Plain convolutions; depthwise with squeeze-and-excitation; paddings "same"."""
    return network(request.param)


@pytest.fixture(scope="module")
def files(
    model: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[LayerError]]:
    folder = tmp_path_factory.mktemp("int8")
    write_model(model, SIZE, folder / "model.onnx")
    errors = quantise(folder / "model.onnx", images, folder / "int8.onnx")
    return folder / "model.onnx", folder / "int8.onnx", errors


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_outputs_are_close_for_any_number_of_images(files: tuple[Path, Path, list[LayerError]], images: Tensor) -> None:
    exact, rounded = run_onnx(files[0], images), run_onnx(files[1], images)
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.2
    assert torch.equal(rounded[:1], run_onnx(files[1], images[:1]))


def test_the_file_is_int8_throughout(files: tuple[Path, Path, list[LayerError]]) -> None:
    """Activations are fused, shapes folded, and every weight of a layer is one byte."""
    found = kinds(files[1])
    assert not found.keys() & {"Relu", "Clip", "Shape", "Pad"}
    assert found["Conv"] == kinds(files[0])["Conv"]
    weights = [tensor for tensor in onnx.load(files[1]).graph.initializer if len(tensor.dims) == 4]
    assert weights
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}


def test_every_layer_has_an_error_of_its_own(files: tuple[Path, Path, list[LayerError]], model: nn.Module) -> None:
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert {error.module for error in files[2]} == layers
    assert all(0 <= error.error < 0.2 for error in files[2])
    assert files[2] == sorted(files[2], key=lambda error: -error.added)


def test_layers_stay_float_where_asked_for(tmp_path: Path, images: Tensor) -> None:
    write_model(network("test_resnet"), SIZE, tmp_path / "model.onnx")
    quantise(tmp_path / "model.onnx", images, tmp_path / "int8.onnx", keep_float=("conv1.*", "layer1.0.conv1"))
    matched = create_weight_matching(str(tmp_path / "model.onnx"), str(tmp_path / "int8.onnx"))
    floats = [t for t in onnx.load(tmp_path / "int8.onnx").graph.initializer if len(t.dims) == 4 and t.data_type == 1]
    stem = sum(isinstance(module, nn.Conv2d) for module in network("test_resnet").conv1.modules())  # type: ignore[operator,union-attr]
    assert len(floats) == stem + 1
    assert matched


@pytest.mark.parametrize(
    ("count", "pattern", "words"), [(0, "", "training images"), (4, "layre1.0.conv1", "layer1.0.conv1")]
)
def test_bad_input_is_told(tmp_path: Path, images: Tensor, count: int, pattern: str, words: str) -> None:
    write_model(network("test_resnet"), SIZE, tmp_path / "model.onnx")
    with pytest.raises(NasKdError, match=words):
        quantise(
            tmp_path / "model.onnx", images[:count], tmp_path / "int8.onnx", keep_float=(pattern,) if pattern else ()
        )
    assert not (tmp_path / "int8.onnx").exists()


def test_module_paths() -> None:
    assert module_of("/layer4/layer4.0/downsample/downsample.0/Conv") == "layer4.0.downsample.0"
    assert module_of("/fc/Gemm") == "fc"
    assert module_of("node_conv2d_3") == "node_conv2d_3"


def test_training_rounds_weights_as_the_file_does(tmp_path: Path, images: Tensor) -> None:
    """What fake quantisation trains with is what the file holds, batch norms folded or not."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(images)
    model.eval()
    write_model(model, SIZE, tmp_path / "model.onnx")
    quantise(tmp_path / "model.onnx", images, tmp_path / "int8.onnx")
    matched = create_weight_matching(str(tmp_path / "model.onnx"), str(tmp_path / "int8.onnx"))
    in_file = next(pair["dequantized"] for pair in matched.values() if pair["float"].ndim == 4)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
    with fake_quantised(model):
        trained_with = model[0].weight.detach() * scale[:, None, None, None]
    np.testing.assert_allclose(in_file, trained_with.numpy(), atol=1e-6)


def test_fake_quantisation_leaves_the_network_as_it_was(images: Tensor) -> None:
    model = network("test_efficientnet").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with fake_quantised(model) as rounded:
        assert isinstance(rounded.train(), FrozenNorms)
        rounded(images).square().mean().backward()
        gradients = sum(parameter.grad is not None for parameter in rounded.parameters())
        assert gradients == len(list(rounded.parameters()))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_large_products_do_not_overflow_on_any_processor(tmp_path: Path) -> None:
    """Weights and inputs near the ends of int8: two products are more than 16 bits hold, which x86 processors without
    VNNI add up in by default."""
    layer = nn.Conv2d(16, 8, 1)
    signs = torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0).view(8, 1, 1, 1)
    with torch.no_grad():
        layer.weight.copy_(signs * (1 - 0.01 * torch.rand(8, 16, 1, 1, generator=torch.Generator().manual_seed(0))))
        layer.bias.zero_()  # type: ignore[union-attr]
    bright = 1 - 0.1 * torch.rand(8, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    write_model(nn.Sequential(layer, nn.Flatten()).eval(), (16, 4, 4), tmp_path / "model.onnx")
    quantise(tmp_path / "model.onnx", bright, tmp_path / "int8.onnx")
    exact, rounded = run_onnx(tmp_path / "model.onnx", bright), run_onnx(tmp_path / "int8.onnx", bright)
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.01
