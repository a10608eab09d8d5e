"""int8 files of networks that were never calibrated: their operators and shapes, with weights and scales made up.

What a compiler estimates of such a file is what it estimates of the real one, but for how well the weights compress.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from nas_kd.analysis.device import DeviceGraph, Operation, device_graph
from nas_kd.analysis.operator_hook import followed
from nas_kd.analysis.schedule import Activations
from nas_kd.analysis.trace import meta_image, without_storage
from nas_kd.errors import ModelError
from nas_kd.networks.tflite_file import Array, FileWriter, Quantisation
from nas_kd.networks.windows import Window

_SCALES = 7  # different ones: sums of equally scaled inputs would be cheaper
_BANK = 1 << 16  # random weights, used again and again
_SPREAD = 1.2  # of the weights beside normal ones of the same largest: a little less compressible, so that bounds hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The bytes of a TensorFlow Lite file, and by the place of each of its operators the module that it is of."""

    content: bytes
    modules: tuple[str, ...]


def drafted(network: nn.Module, input_size: Sequence[int]) -> Draft:
    """The int8 file of a network for one image of `input_size` (C, H, W), its weights left aside.

    Takes some hundredths of a second. Raises ModelError for operators that the way to such files lacks.
    """
    meta = without_storage(network).eval()
    run = followed(meta, meta_image(meta, input_size))
    graph = device_graph(run.activations, run.activations.numbers(run.outputs))
    writer = _DraftWriter(graph, run.activations)
    for operation in graph.operations:
        if operation.kind not in _WRITERS:
            raise ModelError(f"the network runs {operation.kind}, which the way to int8 files for devices lacks")
        _WRITERS[operation.kind](writer, operation)
    content = writer.file.content([writer.of(0)], [writer.of(tensor) for tensor in graph.outputs])
    return Draft(content=content, modules=tuple(operation.module for operation in graph.operations))


class _DraftWriter:
    """The tensors of the file, by those of the graph."""

    def __init__(self, graph: DeviceGraph, activations: Activations) -> None:
        self.file = FileWriter()
        self._graph, self._activations = graph, activations
        self._made: dict[int, int] = {}
        self._forms: dict[int, Quantisation] = {}
        self._bank = np.random.default_rng(0).standard_normal(_BANK)
        self.new(0)

    def of(self, tensor: int) -> int:
        """The file's tensor of one of the graph."""
        return self._made[tensor]

    def size(self, tensor: int) -> tuple[int, ...]:
        """The shape of a tensor in the file: N×H×W×C or N×C."""
        return self.file.shape(self._made[tensor])

    def new(self, tensor: int, *, like: int | None = None, form: Quantisation | None = None) -> int:
        """The file's tensor of one that is made now, in a form of its own, this one, or that of another."""
        shape = tuple(self._activations.made[self._graph.tensors[tensor].number].shape)
        return self.shaped(tensor, (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape, like, form)

    def shaped(
        self, tensor: int, shape: Sequence[int], like: int | None = None, form: Quantisation | None = None
    ) -> int:
        """The same with another shape."""
        own = self._forms[like] if like is not None else form
        own = own or Quantisation(scale=1 / (16 + tensor % _SCALES), zero_point=-128)
        self._forms[tensor] = own
        self._made[tensor] = self.file.tensor(shape, np.dtype(np.int8), own)
        return self._made[tensor]

    def weights(self, shape: Sequence[int], axis: int) -> int:
        """Made-up weights: as trained ones nearly are, normal, the largest of a channel the largest there is."""
        channels, numbers = shape[axis], math.prod(shape)
        spread = _SPREAD * 127 / math.sqrt(2 * math.log(max(numbers // channels, 2)))
        values = np.clip(np.rint(spread * np.resize(self._bank, numbers)), -127, 127).astype(np.int8).reshape(shape)
        scales, zeros = np.full(channels, 1 / 512), np.zeros(channels, dtype=np.int64)
        return self.constant(values, Quantisation(scale=scales, zero_point=zeros, axis=axis))

    def constant(self, values: Array, form: Quantisation | None = None) -> int:
        """A tensor of the file."""
        return self.file.tensor(values.shape, values.dtype, form, values)

    def bias(self, channels: int) -> int:
        """Biases of a layer."""
        return self.constant(np.zeros(channels, dtype=np.int32))


def _sliding(window: Window) -> dict[str, Any]:
    word = "SAME" if any(map(sum, window.pads)) else "VALID"
    return {"padding": word, "strideH": window.strides[0], "strideW": window.strides[1]}


def _convolution(writer: _DraftWriter, operation: Operation) -> None:
    window, (outputs, per_group, height, width) = operation.window, operation.shape
    assert window is not None
    inputs = writer.size(operation.reads[0])[-1]
    options = _sliding(window) | {"dilationHFactor": window.dilations[0], "dilationWFactor": window.dilations[1]}
    kind, kernels = "CONV_2D", writer.weights((outputs, height, width, per_group), 0)
    if per_group == 1 < inputs:
        kind, kernels = "DEPTHWISE_CONV_2D", writer.weights((1, height, width, outputs), 3)
        options["depthMultiplier"] = outputs // inputs
    reads = [writer.of(operation.reads[0]), kernels, writer.bias(outputs)]
    writer.file.operator(kind, reads, [writer.new(operation.makes[0])], **options)


def _matrix(writer: _DraftWriter, operation: Operation) -> None:
    inputs, outputs = operation.shape
    reads = [writer.of(operation.reads[0]), writer.weights((outputs, inputs), 0), writer.bias(outputs)]
    writer.file.operator("FULLY_CONNECTED", reads, [writer.new(operation.makes[0])])


def _simple(kind: str, form: Quantisation | None = None) -> Callable[[_DraftWriter, Operation], None]:
    def write(writer: _DraftWriter, operation: Operation) -> None:
        reads = [writer.of(tensor) for tensor in operation.reads]
        writer.file.operator(kind, reads, [writer.new(operation.makes[0], form=form)])

    return write


def _with_constant(kind: str, fused: str = "") -> Callable[[_DraftWriter, Operation], None]:
    def write(writer: _DraftWriter, operation: Operation) -> None:
        number = writer.constant(np.array([127], dtype=np.int8), Quantisation(scale=3 / 127, zero_point=0))
        reads = [writer.of(operation.reads[0]), number]
        writer.file.operator(kind, reads, [writer.new(operation.makes[0])], fused=fused)

    return write


def _pool(writer: _DraftWriter, operation: Operation) -> None:
    read, window = operation.reads[0], operation.window
    before, made = writer.size(read), writer.new(operation.makes[0], like=read)
    after = writer.file.shape(made)
    if before[3] != after[3]:
        raise ModelError("the network takes slices of channels, which the way to int8 files for devices lacks")
    if window is None:  # every n-th pixel
        steps = tuple(-(-old // new) for old, new in zip(before[1:3], after[1:3], strict=True))
        window = Window(size=before[1:3], kernel=(1, 1), strides=steps, dilations=(1, 1))
    options = _sliding(window) | {"filterHeight": window.kernel[0], "filterWidth": window.kernel[1]}
    writer.file.operator(operation.kind, [writer.of(read)], [made], **options)


def _mean(writer: _DraftWriter, operation: Operation) -> None:
    made, where = writer.new(operation.makes[0]), writer.constant(np.array([1, 2], dtype=np.int32))
    keeps = len(writer.file.shape(made)) == 4
    writer.file.operator("MEAN", [writer.of(operation.reads[0]), where], [made], keepDims=keeps)


def _pad(writer: _DraftWriter, operation: Operation) -> None:
    """Rows and columns as the window says; channels, of which only their number is known, on both sides."""
    read, window = operation.reads[0], operation.window
    batch, *size, channels = writer.size(read)
    more = 0
    if window is None:
        made = writer.new(operation.makes[0], like=read)
        more = writer.file.shape(made)[-1] - channels
        window = Window(size=tuple(size))
    else:
        made = writer.shaped(operation.makes[0], (batch, *window.after_padding.size, channels), like=read)
    sides = ((0, 0), *window.pads, (more // 2, more - more // 2))
    writer.file.operator("PAD", [writer.of(read), writer.constant(np.array(sides, dtype=np.int32))], [made])


def _concatenation(writer: _DraftWriter, operation: Operation) -> None:
    made = writer.new(operation.makes[0], like=operation.reads[0])
    reads = [writer.of(tensor) for tensor in operation.reads]
    writer.file.operator("CONCATENATION", reads, [made], axis=len(writer.file.shape(made)) - 1)


_WRITERS: Mapping[str, Callable[[_DraftWriter, Operation], None]] = {
    "CONV_2D": _convolution,
    "FULLY_CONNECTED": _matrix,
    "ADD": _simple("ADD"),
    "MUL": _simple("MUL"),
    "ADD_CONSTANT": _with_constant("ADD", fused="RELU6"),
    "MUL_CONSTANT": _with_constant("MUL"),
    "LOGISTIC": _simple("LOGISTIC", Quantisation(scale=1 / 256, zero_point=-128)),
    "HARD_SWISH": _simple("HARD_SWISH"),
    "RELU": _simple("RELU"),
    "RELU6": _simple("RELU6"),
    "QUANTIZE": _simple("QUANTIZE"),
    "MAX_POOL_2D": _pool,
    "AVERAGE_POOL_2D": _pool,
    "MEAN": _mean,
    "PAD": _pad,
    "CONCATENATION": _concatenation,
}
