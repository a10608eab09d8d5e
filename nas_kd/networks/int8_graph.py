"""int8 ONNX files as what they mean: nodes that compute, constants, and how each value is rounded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas_kd.errors import ModelError
from nas_kd.networks.onnx import BATCH
from nas_kd.networks.tflite_file import Array, Quantisation

UNSIGNED = 128  # by which a byte of ONNX is more than one of TensorFlow Lite


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Constant:
    """Numbers of the file, and how they are quantised."""

    values: Array
    quantisation: Quantisation


class Graph:
    """The nodes of an int8 ONNX file apart from those that round, and what is known of their values."""

    def __init__(self, path: Path) -> None:
        import onnx
        from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

        model = onnx.load(path)
        make_dim_param_fixed(model.graph, BATCH, 1)
        model = onnx.shape_inference.infer_shapes(model)
        self.path = path
        self.plain = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
        self._shapes = {value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in values}
        self.constants: dict[str, Constant] = {}
        self.forms: dict[str, Quantisation] = {}  # by the value that is rounded
        self._sources: dict[str, str] = {}  # by a value that was rounded: what it was before
        self.nodes = []
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                self.forms.setdefault(node.input[0], self._quantisation(node))
                self._sources[node.output[0]] = self.source(node.input[0])
            elif node.op_type == "DequantizeLinear" and node.input[0] in self.plain:
                held = self.plain[node.input[0]]
                self.constants[node.output[0]] = Constant(values=held, quantisation=self._quantisation(node))
            elif node.op_type == "DequantizeLinear":
                self._sources[node.output[0]] = self.source(node.input[0])
            elif node.op_type != "Constant":
                self.nodes.append(node)
        self.input, self.output = model.graph.input[0].name, self.source(model.graph.output[0].name)

    def _quantisation(self, node: Any) -> Quantisation:
        scale, zero_point = self.plain[node.input[1]], self.plain[node.input[2]]
        shift = UNSIGNED if zero_point.dtype == np.uint8 else 0
        if scale.ndim:
            return Quantisation(scale=scale, zero_point=zero_point.astype(np.int64) - shift)
        return Quantisation(scale=float(scale), zero_point=int(zero_point) - shift)

    def source(self, name: str) -> str:
        """The value that this one is the rounded form of."""
        return self._sources.get(name, name)

    def products(self, name: str) -> set[tuple[str, ...]] | None:
        """What a value is multiplied with, itself last; None where it is read for something else."""
        read = [node for node in self.nodes if any(self.source(own) == name for own in node.input)]
        if any(node.op_type != "Mul" for node in read):
            return None
        pairs = (sorted(map(self.source, node.input), key=lambda own: own == name) for node in read)
        return {tuple(pair) for pair in pairs}

    def readers(self, name: str) -> set[str]:
        """The kinds of nodes that read a value."""
        return {node.op_type for node in self.nodes if any(self.source(read) == name for read in node.input)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value, N×C×H×W or N×C. Raises ModelError where it is not known."""
        shape = self._shapes.get(name, ())
        if len(shape) not in (2, 4) or not all(shape):
            raise ModelError(f"{self.path}: the shape of {name} is {shape or 'not known'}: only images are converted")
        return shape
