"""Networks as int8 ONNX files: calibrated on images, weights per channel.

Activations are unsigned and their ranges the smallest and largest values that calibration sees: signed ones run slower
than float on x86, and neither entropy nor percentiles were more accurate (docs/decisions.md).
"""

from __future__ import annotations

import fnmatch
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nas_kd.errors import ModelError, NasKdError, nearest
from nas_kd.networks.onnx import BATCH, first_line, free_batch, need, open_session

Floats = NDArray[np.float32]
_LAYERS = ("Conv", "Gemm", "MatMul")  # that have weights
_FUSED = ("Clip", "Relu")  # a quantised layer ends in these: one that is left would be quantised before its bound
_DEQUANTISED, _INPUT = "_DequantizeLinear_Output", "_QuantizeLinear_Input"  # what ONNX Runtime appends to names
_COMPARED = 16  # images on which layers are compared
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """What int8 does to one layer.

    `module` is its path in the network, `error` the mean squared difference of its output from the float network's as
    a share of that output's mean square, `added` how much of it was not in what the layer read.
    """

    module: str
    error: float
    added: float


def quantise(path: Path, images: Tensor, target: Path, *, keep_float: Sequence[str] = ()) -> list[LayerError]:
    """Writes the int8 form of a float ONNX file of ours, for any number of images.

    Args:
        path: The float file, with one input `input` (N×C×H×W) and one output.
        images: N×C×H×W float32, normalised as the network wants them; some hundred training images.
        target: The file to write.
        keep_float: Module paths, or patterns of them, of layers that stay float.

    Returns:
        The error of every layer with weights, the one that adds the most first.

    Raises:
        NasKdError: ONNX Runtime is not installed, there are no images, or a pattern fits no layer.
        ModelError: The file cannot be quantised.
    """
    need("onnx", "onnxruntime")
    if not len(images):
        raise NasKdError("int8 needs some training images to find the range of every activation: there are none")
    pixels = np.ascontiguousarray(images.numpy(), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        fixed = Path(folder, "fixed.onnx")
        _fix(path, fixed)
        kept = _nodes_of(fixed, keep_float)
        int8 = Path(folder, "int8.onnx")
        _quantise(fixed, pixels, int8, kept)
        errors = _layer_errors(fixed, int8, pixels[:_COMPARED])
        free_batch(int8)
        shutil.copyfile(int8, target)
        return errors


def _fix(path: Path, target: Path) -> None:
    """Fixes the number of images to 1 and folds what then is constant: paddings are arithmetic on shapes else."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    model = onnx.load(path)
    make_dim_param_fixed(model.graph, BATCH, 1)
    onnx.save(model, target)
    try:
        quant_pre_process(str(target), str(target))
    except Exception as error:  # of any kind: onnxruntime's errors share no class
        raise ModelError(f"{path.name} cannot be prepared for int8: {first_line(error)}") from error


def _quantise(path: Path, images: Floats, target: Path, kept: Sequence[str]) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it tells the root logger what it does
    try:
        quantize_static(
            str(path),
            str(target),
            _reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=list(kept),
        )
    except Exception as error:  # of any kind: onnxruntime's errors share no class
        raise ModelError(f"{path.name} cannot be quantised: {first_line(error)}") from error
    finally:
        root.setLevel(level)
    _check(target, bool(kept))


def _reader(images: Floats) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Feeds the calibration one image at a time."""

        def __init__(self) -> None:
            self.left: Iterator[dict[str, Floats]] = iter({"input": images[i : i + 1]} for i in range(len(images)))

        def get_next(self) -> dict[str, Floats] | None:
            return next(self.left, None)

    return Reader()


def _check(path: Path, has_float_layers: bool) -> None:
    """Warns of activations that are quantised apart from their layer, which costs accuracy."""
    import onnx

    left = Counter(node.op_type for node in onnx.load(path).graph.node)
    unfused = [f"{left[kind]} {kind}" for kind in _FUSED if left[kind]]
    if unfused and not has_float_layers:
        _logger.warning("%s of the network stay beside their layers in int8: expect to lose accuracy", unfused)


def _nodes_of(path: Path, patterns: Sequence[str]) -> list[str]:
    """The names of the nodes of the layers that any of `patterns` fits."""
    import onnx

    nodes = {node.name: module_of(node.name) for node in onnx.load(path).graph.node if node.op_type in _LAYERS}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(module, pattern) for module in nodes.values()):
            hint = nearest(pattern, list(nodes.values()))
            raise NasKdError(
                f"no layer of the network is named {pattern!r}{hint}; layers are {', '.join(nodes.values())}"
            )
    return [n for n, module in nodes.items() if any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)]


def module_of(node: str) -> str:
    """Returns the path of the module that a node of torch's exporter comes from.

    >>> module_of("/blocks/blocks.1/blocks.1.0/conv_pw/Conv"), module_of("/layer2/layer2.0/down/down.0/Conv")
    ('blocks.1.0.conv_pw', 'layer2.0.down.0')
    """
    path: list[str] = []
    for scope in node.strip("/").split("/")[:-1]:
        if path and scope.startswith(f"{path[-1]}."):  # the children of a container repeat its name
            path.pop()
        path.append(scope)
    return ".".join(path) or node


def _layer_errors(fixed: Path, int8: Path, images: Floats) -> list[LayerError]:
    import onnx

    nodes = onnx.load(int8).graph.node
    made = {name for node in nodes for name in node.output}
    # what each layer reads and writes in int8, after it was rounded: rounding is also what bounds it to its activation
    wires = {node.name: (node.input[0], _rounded(node.output[0], made)) for node in nodes if node.op_type in _LAYERS}
    plain = {name: _plain_name(name) for pair in wires.values() for name in pair}
    exact, rounded = _outputs(fixed, images, set(plain.values())), _outputs(int8, images, set(plain))
    shares = {
        name: float(np.square(rounded[name] - exact[own]).mean() / max(np.square(exact[own]).mean(), 1e-12))
        for name, own in plain.items()
    }
    errors = [
        LayerError(module=module_of(name), error=shares[after], added=shares[after] - shares[before])
        for name, (before, after) in wires.items()
    ]
    return sorted(errors, key=lambda layer: -layer.added)


def _rounded(name: str, made: set[str]) -> str:
    """The tensor behind the rounding of another one; itself where it stays float."""
    behind = (f"{name}{_DEQUANTISED}", name.removesuffix(_INPUT))
    return next((other for other in behind if other in made), name)


def _plain_name(name: str) -> str:
    """The name in the float file of a tensor in int8."""
    return name.removesuffix(_DEQUANTISED).removesuffix(_INPUT)


def _outputs(path: Path, images: Floats, names: set[str]) -> dict[str, Floats]:
    """What some tensors of a file hold for N images, one after the other."""
    import onnx

    model = onnx.load(path)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - known))
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder, "all.onnx"))
        session = open_session(Path(folder, "all.onnx"), threads=1)
        wanted = sorted(names - {value.name for value in model.graph.input})
        runs = [session.run(wanted, {"input": images[i : i + 1]}) for i in range(len(images))]
    found = {name: np.concatenate([run[column] for run in runs]) for column, name in enumerate(wanted)}
    return {**found, **({"input": images} if "input" in names else {})}
