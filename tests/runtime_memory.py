"""What ONNX Runtime keeps alive while it runs a file: read off the graph that it makes of it, as it runs that."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

# kernels that write over an input that is read no more, and those that make nothing
IN_PLACE = frozenset("Add Mul Relu Clip Sigmoid HardSigmoid Gelu QuickGelu".split())
VIEWS = frozenset("Reshape Flatten Squeeze Unsqueeze Identity".split())


def most_alive(path: Path) -> int:
    """The most bytes that are alive at once in a file of float32 with one input and one output, its shapes fixed."""
    image, nodes = _runs(optimised(path))
    read_last = {name: index for index, (node, _) in enumerate(nodes) for name in node.input}
    places, lengths = {image[0]: image[0]}, dict([image])  # by tensor the one whose memory it has; its bytes
    lives = {image[0]: [0, read_last[image[0]]]}
    for index, (node, length) in enumerate(nodes):
        read, made = [places[name] for name in node.input if name in places], node.output[0]
        free = [p for p in read if p != image[0] and lives[p][1] == index and lengths[p] == length]
        over = read[:1] if node.op_type in VIEWS else free[-1:] if node.op_type in IN_PLACE else []
        places[made] = place = (over or [made])[0]
        lengths.setdefault(place, length)
        lives.setdefault(place, [index, index])[1] = max(index, read_last.get(made, len(nodes) - 1))
    return max(
        sum(lengths[place] for place, (first, last) in lives.items() if first <= index <= last)
        for index in range(len(nodes))
    )


def optimised(path: Path) -> Path:
    """Writes the graph that ONNX Runtime makes of a file, before the layouts of its processor, with names for all
    nodes."""
    options = _quiet()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    target = path.with_suffix(".optimised.onnx")
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    model = onnx.load(target)
    for number, node in enumerate(model.graph.node):
        node.name = f"node {number}"
    onnx.save(model, target)
    return target


def _runs(path: Path) -> tuple[tuple[str, int], list[tuple[Any, int]]]:
    """The image and its bytes, and the nodes of a file in the order in which they run with those of what each makes."""
    options = _quiet()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    image = session.get_inputs()[0]
    session.run(None, {image.name: np.zeros(image.shape, np.float32)})
    nodes = {node.name: node for node in onnx.load(path).graph.node}
    events = [event for event in json.loads(Path(session.end_profiling()).read_text()) if event["cat"] == "Node"]
    runs = [(e["name"].split("_")[0], e["args"]) for e in events if e["name"].endswith("_kernel_time")]
    made = [(nodes[name], 4 * math.prod(*what["output_type_shape"][0].values())) for name, what in runs]
    return (image.name, 4 * math.prod(image.shape)), made


def _quiet() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return options
