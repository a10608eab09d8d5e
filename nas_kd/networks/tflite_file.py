"""TensorFlow Lite files: tensors, operators, and the flatbuffer that holds them."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas_kd.errors import NasKdError
from nas_kd.networks.windows import as_needed

Array = NDArray[Any]
_TOOLS = {"tflite_micro": "tflite-micro", "ethosu": "ethos-u-vela"}
_OPTIONS = {  # by operator: its options' name, and the version of its int8 form
    "CONV_2D": ("Conv2DOptions", 3),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", 3),
    "FULLY_CONNECTED": ("FullyConnectedOptions", 4),
    "ADD": ("AddOptions", 2),
    "MUL": ("MulOptions", 2),
    "MEAN": ("ReducerOptions", 2),
    "MAX_POOL_2D": ("Pool2DOptions", 2),
    "AVERAGE_POOL_2D": ("Pool2DOptions", 2),
    "CONCATENATION": ("ConcatenationOptions", 2),
    "PAD": ("PadOptions", 2),
    "PADV2": ("PadV2Options", 2),
    "QUANTIZE": ("QuantizeOptions", 2),
    "HARD_SWISH": ("HardSwishOptions", 1),
    "LOGISTIC": ("", 2),
    "RELU": ("", 2),
    "RELU6": ("", 2),
}


def has_interpreter() -> bool:
    """Whether TensorFlow Lite Micro is installed."""
    return importlib.util.find_spec("tflite_micro") is not None


def has_tools() -> bool:
    """Whether both the interpreter and the compiler are installed."""
    return all(importlib.util.find_spec(name) is not None for name in _TOOLS)


def need_tools(*packages: str) -> None:
    """Raises NasKdError where the interpreter, the compiler, or of them those named, are not installed."""
    missing = [name for name in packages or _TOOLS if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(_TOOLS[name] for name in missing)
        raise NasKdError(f"microcontrollers need {names}: pip install 'nas-kd[mcu]'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """A real number is `scale` × (byte − `zero_point`); of weights one of each per channel, along `axis`."""

    scale: float | Array
    zero_point: int | Array
    axis: int = 0

    def along(self, axis: int) -> Quantisation:
        """The same along another axis."""
        return replace(self, axis=axis)


class FileWriter:
    """Collects tensors and operators."""

    def __init__(self) -> None:
        need_tools("tflite_micro")
        from tflite_micro.tensorflow.lite.micro.python import schema_py_generated

        self._schema = schema_py_generated
        self._graph = self._schema.SubGraphT()
        self._graph.tensors, self._graph.operators = [], []
        self._buffers = [self._schema.BufferT()]  # the first is that of activations: empty
        self._codes: list[Any] = []

    def tensor(
        self, shape: Sequence[int], dtype: np.dtype[Any], form: Quantisation | None, values: Array | None = None
    ) -> int:
        """Adds a tensor and returns its number; one with `values` is constant."""
        made = self._schema.TensorT()
        made.shape = np.array(shape, dtype=np.int32)
        made.type = {"int8": self._schema.TensorType.INT8, "int32": self._schema.TensorType.INT32}[dtype.name]
        if values is not None:
            buffer = self._schema.BufferT()
            buffer.data = np.frombuffer(values.tobytes(), dtype=np.uint8)
            self._buffers.append(buffer)
            made.buffer = len(self._buffers) - 1
        if form is not None:
            made.quantization = self._schema.QuantizationParametersT()
            made.quantization.scale = np.atleast_1d(np.asarray(form.scale, dtype=np.float32))
            made.quantization.zeroPoint = np.atleast_1d(np.asarray(form.zero_point, dtype=np.int64))
            made.quantization.quantizedDimension = form.axis
        self._graph.tensors.append(made)
        return len(self._graph.tensors) - 1

    def shape(self, tensor: int) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(int(length) for length in self._graph.tensors[tensor].shape)

    def operator(
        self,
        kind: str,
        reads: Sequence[int],
        makes: Sequence[int],
        *,
        padding: str = "",
        fused: str = "",
        **options: int,
    ) -> None:
        """Adds an operator with its options, by the names of the schema."""
        made = self._schema.OperatorT()
        made.inputs, made.outputs = np.array(reads, dtype=np.int32), np.array(makes, dtype=np.int32)
        made.opcodeIndex = self._code(kind)
        name = _OPTIONS[kind][0]
        if name:
            made.builtinOptionsType = getattr(self._schema.BuiltinOptions, name)
            made.builtinOptions = getattr(self._schema, f"{name}T")()
            for field, value in options.items():
                setattr(made.builtinOptions, field, value)
        if padding:
            made.builtinOptions.padding = getattr(self._schema.Padding, padding)
        if fused:
            made.builtinOptions.fusedActivationFunction = getattr(self._schema.ActivationFunctionType, fused)
        self._graph.operators.append(made)

    def _code(self, kind: str) -> int:
        """The number of a kind of operator in the file's list of kinds."""
        value = getattr(self._schema.BuiltinOperator, kind)
        known = [code.builtinCode for code in self._codes]
        if value not in known:
            code = self._schema.OperatorCodeT()
            code.builtinCode, code.deprecatedBuiltinCode, code.version = value, min(value, 127), _OPTIONS[kind][1]
            self._codes.append(code)
            return len(known)
        return known.index(value)

    def _order(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Puts operators in the order of `as_needed`, and numbers tensors in that in which they are used."""
        graph = self._graph
        makers = {tensor: number for number, own in enumerate(graph.operators) for tensor in own.outputs}
        needs = [[makers[tensor] for tensor in own.inputs if tensor in makers] for own in graph.operators]
        order = as_needed(needs, [makers[tensor] for tensor in outputs])
        graph.operators = [graph.operators[number] for number in order]
        used = dict.fromkeys((*inputs, *(t for own in graph.operators for t in (*own.inputs, *own.outputs))))
        place = {tensor: number for number, tensor in enumerate(used)}
        graph.tensors = [graph.tensors[tensor] for tensor in used]
        for own in graph.operators:
            own.inputs, own.outputs = (_numbers(place[t] for t in tensors) for tensors in (own.inputs, own.outputs))
        graph.inputs, graph.outputs = (_numbers(place[t] for t in tensors) for tensors in (inputs, outputs))

    def content(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The bytes of the file, all weights inside the flatbuffer: TensorFlow Lite Micro takes those behind it for
        activations, without an error."""
        import flatbuffers

        self._order(inputs, outputs)
        model = self._schema.ModelT()
        model.version, model.subgraphs, model.operatorCodes, model.buffers = (
            3,
            [self._graph],
            self._codes,
            self._buffers,
        )
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _numbers(values: Iterable[int]) -> Array:
    return np.fromiter(values, dtype=np.int32)


def operators_of(path: Path) -> dict[str, int]:
    """How many operators of each kind a file has, the most frequent first."""
    from tflite_micro.tensorflow.lite.micro.python import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    codes = [names[code.builtinCode] for code in model.operatorCodes]
    return dict(Counter(codes[own.opcodeIndex] for own in model.subgraphs[0].operators).most_common())
