"""int8 ONNX files as int8 TensorFlow Lite files, which interpreters on microcontrollers run.

Both hold the same numbers: the weights, the biases and the scales that calibration found, each byte of an activation
128 less, dimensions in the order N×H×W×C. Activations are bounded by what a byte can hold, as in the ONNX file. A
padding that TensorFlow has no word for becomes an operator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas_kd.errors import ModelError
from nas_kd.networks.int8_graph import UNSIGNED, Constant, Graph
from nas_kd.networks.tflite_file import Array, FileWriter, Quantisation
from nas_kd.networks.windows import Window

_GATE = Quantisation(scale=1 / 256, zero_point=-128)  # the one form in which LOGISTIC gives its output
_SIX = Quantisation(scale=6 / 255, zero_point=-128)
_FLAT = ("Flatten", "Reshape", "Squeeze")


def write_tflite(path: Path, target: Path) -> None:
    """Writes an int8 ONNX file of ours (`nas_kd.networks.int8`), for one image, as an int8 TensorFlow Lite file.

    Raises ModelError for operators that TensorFlow Lite has no int8 form of here, and for layers that stay float.
    """
    graph = Graph(path)
    missing = sorted({node.op_type for node in graph.nodes if node.op_type not in _WRITERS})
    if missing:
        raise ModelError(
            f"{path} uses {', '.join(missing)}, which the way to TensorFlow Lite Micro lacks: "
            f"it has {', '.join(sorted(_WRITERS))}; choose another base, or leave the model in ONNX"
        )
    file = FileWriter()
    tensors = _Tensors(graph, file)
    given = tensors.of(graph.input)
    for node in graph.nodes:
        _WRITERS[node.op_type](node, tensors)
    target.write_bytes(file.content([given], [tensors.of(graph.output)]))


class _Tensors:
    """The tensors of the TensorFlow Lite file, by the values of the ONNX file."""

    def __init__(self, graph: Graph, file: FileWriter) -> None:
        self.graph, self.file = graph, file
        self._made: dict[str, int] = {}
        self._forms: dict[int, Quantisation] = {}
        self.strided: dict[str, tuple[str, int, int]] = {}  # slices that the next one takes along
        self.gates: dict[str, str] = {}  # hard sigmoids that the product with what they read takes along

    def of(self, name: str) -> int:
        """The tensor of a value that was made; of the image, or of a constant, a new one."""
        source = self.graph.source(name)
        if source not in self._made and source in self.graph.constants:
            constant = self.graph.constants[source]
            return self.constant(_beside_images(source, _signed(constant.values)), constant.quantisation)
        return self._made[source] if source in self._made else self.new(source)

    def new(self, name: str, form: Quantisation | None = None) -> int:
        """The tensor of a value that is made now, in a form of its own or as it is rounded."""
        form = form or self.graph.forms.get(name)
        if form is None:
            raise ModelError(f"{self.graph.path}: {name} stays float, and interpreters of int8 take no such layers")
        tensor = self.activation(_channels_last(self.graph.shape(name)), form)
        self._made[name] = tensor
        return tensor

    def same(self, name: str, tensor: int) -> None:
        """A value is the same bytes as a tensor."""
        self._made[name] = tensor

    def activation(self, shape: Sequence[int], form: Quantisation) -> int:
        """A tensor that the interpreter keeps in its arena."""
        tensor = self.file.tensor(shape, np.dtype(np.int8), form)
        self._forms[tensor] = form
        return tensor

    def constant(self, values: Array, form: Quantisation | None = None) -> int:
        """A tensor of the file."""
        return self.file.tensor(values.shape, values.dtype, form, values)

    def form(self, tensor: int) -> Quantisation:
        """How a tensor is quantised."""
        return self._forms[tensor]


def _channels_last(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else tuple(shape)


def _beside_images(name: str, values: Array) -> Array:
    """A constant that is added to or multiplied with images, its channels last."""
    if values.ndim in (3, 4):
        return np.ascontiguousarray(np.moveaxis(values, -3, -1))
    if values.size > 1:
        raise ModelError(f"{name} of shape {values.shape} goes with the columns of images: it is not converted")
    return values


def _signed(values: Array) -> Array:
    return (values.astype(np.int16) - UNSIGNED).astype(np.int8) if values.dtype == np.uint8 else values


def _attributes(node: Any) -> dict[str, Any]:
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


# windows that slide over an image


def _window(node: Any, size: Sequence[int], kernel: Sequence[int]) -> Window:
    """How a node slides over an image of this size."""
    facts = _attributes(node)
    top, left, bottom, right = facts.get("pads", (0, 0, 0, 0))
    if facts.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ModelError(f"{node.name}: paddings that are not numbers are not converted")
    return Window(
        size=tuple(size),
        kernel=tuple(kernel),
        strides=tuple(facts.get("strides", (1, 1))),
        dilations=tuple(facts.get("dilations", (1, 1))),
        pads=((top, bottom), (left, right)),
    )


def _padded(window: Window, tensors: _Tensors, tensor: int, filled: int) -> tuple[int, str]:
    """The tensor that a window slides over, `filled` around where it has to be padded, and TensorFlow's word for what
    is left to pad."""
    if not window.padded:
        return tensor, "SAME" if any(map(sum, window.pads)) else "VALID"
    batch, *_, channels = tensors.file.shape(tensor)
    sides = [length + sum(pad) for length, pad in zip(window.size, window.pads, strict=True)]
    padded = tensors.activation((batch, *sides, channels), tensors.form(tensor))
    _write_pad(tensors, tensor, padded, ((0, 0), *window.pads, (0, 0)), filled)
    return padded, "VALID"


def _write_pad(tensors: _Tensors, tensor: int, padded: int, amounts: Sequence[tuple[int, int]], filled: int) -> None:
    sides = tensors.constant(np.array(amounts, dtype=np.int32))
    if filled == tensors.form(tensor).zero_point:
        tensors.file.operator("PAD", [tensor, sides], [padded])
    else:
        fill = tensors.constant(np.array([filled], dtype=np.int8), tensors.form(tensor))
        tensors.file.operator("PADV2", [tensor, sides, fill], [padded])


def _strides(window: Window) -> dict[str, int]:
    return {"strideH": window.strides[0], "strideW": window.strides[1]}


# one function for each operator of ONNX


def _conv(node: Any, tensors: _Tensors) -> None:
    graph = tensors.graph
    weight = _weights(node, graph)
    image, shape = tensors.of(node.input[0]), graph.shape(graph.source(node.input[0]))
    window, groups = _window(node, shape[2:], weight.values.shape[2:]), _attributes(node).get("group", 1)
    image, word = _padded(window, tensors, image, int(tensors.form(image).zero_point))
    depthwise = groups == shape[1] and groups > 1
    order, axis = ((1, 2, 3, 0), 3) if depthwise else ((0, 2, 3, 1), 0)
    kernels = tensors.constant(np.ascontiguousarray(weight.values.transpose(order)), weight.quantisation.along(axis))
    options: dict[str, Any] = _strides(window) | {
        "dilationHFactor": window.dilations[0],
        "dilationWFactor": window.dilations[1],
    }
    if depthwise:
        options["depthMultiplier"] = weight.values.shape[0] // groups
    kind = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    made = tensors.new(node.output[0])
    tensors.file.operator(
        kind, [image, kernels, _bias(node, tensors, len(weight.values))], [made], padding=word, **options
    )


def _gemm(node: Any, tensors: _Tensors) -> None:
    graph, facts = tensors.graph, _attributes(node)
    if facts.get("transA", 0) or facts.get("alpha", 1.0) != 1.0 or facts.get("beta", 1.0) != 1.0:
        raise ModelError(f"{node.name}: a scaled or transposed Gemm is not converted")
    weight = _weights(node, graph)
    rows = weight.values if facts.get("transB", 0) else weight.values.T
    image = tensors.of(node.input[0])
    _, *sides, channels = tensors.file.shape(image)
    if math.prod(sides) > 1:  # ONNX flattens C×H×W
        rows = rows.reshape(-1, channels, *sides).transpose(0, 2, 3, 1).reshape(len(rows), -1)
    kernels = tensors.constant(np.ascontiguousarray(rows), weight.quantisation.along(0))
    made = tensors.new(node.output[0])
    tensors.file.operator("FULLY_CONNECTED", [image, kernels, _bias(node, tensors, len(rows))], [made])


def _weights(node: Any, graph: Graph) -> Constant:
    """The weights of a layer. Raises ModelError where they are not int8."""
    weight = graph.constants.get(node.input[1])
    if weight is None or weight.values.dtype != np.int8:
        raise ModelError(f"{node.name} has no int8 weights of its own, and interpreters of int8 take no such layers")
    return weight


def _bias(node: Any, tensors: _Tensors, channels: int) -> int:
    """The tensor of a layer's biases, zeros without any: interpreters break off where there is none. Their scale is
    that of what is read times that of the weights: it needs no saying."""
    constant = tensors.graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    values = np.zeros(channels, dtype=np.int32) if constant is None else constant.values.astype(np.int32)
    return tensors.constant(values)


def _simple(kind: str, form: Quantisation | None = None) -> Callable[[Any, _Tensors], None]:
    """An operator that has the same inputs and outputs here and there."""

    def write(node: Any, tensors: _Tensors) -> None:
        read = [tensors.of(name) for name in node.input]
        tensors.file.operator(kind, read, [tensors.new(node.output[0], form)])

    return write


def _clip(node: Any, tensors: _Tensors) -> None:
    bounds = [_number(tensors.graph, name) for name in node.input[1:]]
    kind = {"[0.0, 6.0]": "RELU6", "[0.0]": "RELU", "[0.0, None]": "RELU"}.get(str(bounds))
    if kind is None:
        raise ModelError(f"{node.name} bounds its input by {bounds}: only ReLU and ReLU6 are converted")
    tensors.file.operator(kind, [tensors.of(node.input[0])], [tensors.new(node.output[0])])


def _number(graph: Graph, name: str) -> float | None:
    """The one number that a constant holds, rounded to what it was before."""
    if name in graph.constants:
        held = graph.constants[name]
        form = held.quantisation
        return float((_signed(held.values).item() - int(form.zero_point)) * float(form.scale))
    return float(graph.plain[name].item()) if name in graph.plain else None


def _mul(node: Any, tensors: _Tensors) -> None:
    """A product; that of a value and its own hard sigmoid is an operator of its own."""
    one, two = map(tensors.graph.source, node.input)
    gated = next((x for x, gate in ((one, two), (two, one)) if tensors.gates.get(gate) == x), None)
    if gated is None:
        _simple("MUL")(node, tensors)
    else:
        tensors.file.operator("HARD_SWISH", [tensors.of(gated)], [tensors.new(node.output[0])])


def _hard_sigmoid(node: Any, tensors: _Tensors) -> None:
    """Min and max of x + 3, and a sixth of it."""
    facts = _attributes(node)
    source = tensors.graph.source(node.input[0])
    if tensors.graph.products(node.output[0]) == {(source, node.output[0])}:
        tensors.gates[node.output[0]] = source
        return
    if not (math.isclose(facts.get("alpha", 0.2), 1 / 6, rel_tol=1e-4) and facts.get("beta", 0.5) == 0.5):
        raise ModelError(f"{node.name} is another hard sigmoid than min(max(x + 3, 0), 6) / 6: it is not converted")
    read = tensors.of(node.input[0])
    shifted = tensors.activation(tensors.file.shape(read), _SIX)
    three = tensors.constant(np.array([127], dtype=np.int8), Quantisation(scale=3 / 127, zero_point=0))
    tensors.file.operator("ADD", [read, three], [shifted], fused="RELU6")
    sixth = tensors.constant(np.array([127], dtype=np.int8), Quantisation(scale=1 / 6 / 127, zero_point=0))
    tensors.file.operator("MUL", [shifted, sixth], [tensors.new(node.output[0], _GATE)])


def _mean(node: Any, tensors: _Tensors) -> None:
    facts, graph = _attributes(node), tensors.graph
    axes = facts.get("axes") or ([2, 3] if len(node.input) < 2 else graph.plain[node.input[1]].tolist())
    shape = graph.shape(graph.source(node.input[0]))
    if len(shape) != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise ModelError(f"{node.name} takes the mean over {axes}: only that of whole images is converted")
    keeps = bool(facts.get("keepdims", 1))
    where = tensors.constant(np.array([1, 2], dtype=np.int32))
    tensors.file.operator("MEAN", [tensors.of(node.input[0]), where], [tensors.new(node.output[0])], keepDims=keeps)


def _pool(node: Any, tensors: _Tensors) -> None:
    facts, graph = _attributes(node), tensors.graph
    image, shape = tensors.of(node.input[0]), graph.shape(graph.source(node.input[0]))
    window = _window(node, shape[2:], facts["kernel_shape"])
    largest = node.op_type == "MaxPool"
    counts_padding = largest or bool(facts.get("count_include_pad", 0)) == bool(window.padded)
    made = graph.shape(node.output[0])
    covered = [
        (length + sum(pad) - kernel) // stride + 1
        for length, pad, kernel, stride in zip(shape[2:], window.pads, window.kernel, window.strides, strict=True)
    ]
    if list(made[2:]) != covered or (any(map(sum, window.pads)) and not counts_padding):
        raise ModelError(f"{node.name} pools over a border in a way of its own: it is not converted")
    form = tensors.form(image)
    image, word = _padded(window, tensors, image, -128 if largest else int(form.zero_point))
    kind = "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D"
    options: dict[str, Any] = _strides(window) | {"filterHeight": window.kernel[0], "filterWidth": window.kernel[1]}
    tensors.file.operator(kind, [image], [tensors.new(node.output[0], form)], padding=word, **options)


def _flat(node: Any, tensors: _Tensors) -> None:
    """The same bytes: fully connected layers read them as they are."""
    graph = tensors.graph
    before, after = graph.shape(graph.source(node.input[0])), graph.shape(node.output[0])
    if len(after) != 2 or math.prod(before) != math.prod(after):
        raise ModelError(f"{node.name} makes {after} of {before}: only flattening is converted")
    tensors.same(node.output[0], tensors.of(node.input[0]))


def _slice(node: Any, tensors: _Tensors) -> None:
    """Each second pixel, or third, is what a pooling over single pixels takes; rows and columns at once."""
    graph = tensors.graph
    starts, _, axes, steps = (graph.plain[name].tolist() for name in node.input[1:5])
    shape, made = graph.shape(graph.source(node.input[0])), graph.shape(node.output[0])
    strides = dict(zip(axes, steps, strict=True))
    if made == shape:
        tensors.same(node.output[0], tensors.of(node.input[0]))
        return
    if any(starts) or not set(strides) <= {2, 3} or any(step < 2 for step in steps):
        raise ModelError(f"{node.name} makes {made} of {shape}: of slices only every n-th pixel is converted")
    source, rows, columns = tensors.strided.get(graph.source(node.input[0]), (node.input[0], 1, 1))
    rows, columns = rows * strides.get(2, 1), columns * strides.get(3, 1)
    if graph.readers(node.output[0]) == {"Slice"}:
        tensors.strided[node.output[0]] = (source, rows, columns)
        return
    image = tensors.of(source)
    options: dict[str, Any] = {"strideH": rows, "strideW": columns, "filterHeight": 1, "filterWidth": 1}
    output = tensors.new(node.output[0], tensors.form(image))
    tensors.file.operator("MAX_POOL_2D", [image], [output], padding="VALID", **options)


def _pad(node: Any, tensors: _Tensors) -> None:
    graph, image = tensors.graph, tensors.of(node.input[0])
    value = _number(graph, node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
    sides = graph.plain[node.input[1]].reshape(2, -1).T.tolist()
    if value or _attributes(node).get("mode", b"constant") != b"constant" or len(sides) != 4 or np.min(sides) < 0:
        raise ModelError(f"{node.name} pads by something else than zeros: it is not converted")
    form = tensors.form(image)
    amounts = [(before, after) for before, after in (sides[0], *sides[2:], sides[1])]
    _write_pad(tensors, image, tensors.new(node.output[0], form), amounts, int(form.zero_point))


def _concat(node: Any, tensors: _Tensors) -> None:
    """All that is put together needs one scale: what has another is rounded anew."""
    axis = _attributes(node)["axis"]
    made = tensors.new(node.output[0])
    rank, form = len(tensors.file.shape(made)), tensors.graph.forms[node.output[0]]
    if axis != 1:
        raise ModelError(f"{node.name} puts tensors together along axis {axis}: only channels are converted")
    parts = []
    for name in node.input:
        part = tensors.of(name)
        if tensors.form(part) != form:
            rounded = tensors.activation(tensors.file.shape(part), form)
            tensors.file.operator("QUANTIZE", [part], [rounded])
            part = rounded
        parts.append(part)
    tensors.file.operator("CONCATENATION", parts, [made], axis=rank - 1)


_WRITERS: Mapping[str, Callable[[Any, _Tensors], None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "Add": _simple("ADD"),
    "Mul": _mul,
    "Relu": _simple("RELU"),
    "Clip": _clip,
    "Sigmoid": _simple("LOGISTIC", _GATE),
    "HardSigmoid": _hard_sigmoid,
    "GlobalAveragePool": _mean,
    "ReduceMean": _mean,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Concat": _concat,
    "Slice": _slice,
    "Pad": _pad,
    **dict.fromkeys(_FLAT, _flat),
}
