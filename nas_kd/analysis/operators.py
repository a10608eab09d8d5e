"""Rules of what each ATen operator does to the labels of channels: pass them on, tie them, or freeze them.

Convolutional networks use some forty operators; whatever is not listed in `_GROUPS` freezes what goes through it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas_kd.analysis.labels import Labelling, Labels, tensors
from nas_kd.analysis.shape_operators import SHAPE_RULES, Rule, broadcast

FEWEST_GROUPS = 3  # a convolution in fewer is thinned out inside its groups: whole ones would leave half or nothing


def _pointwise(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    """Any elementwise operator: dimensions that meet are tied."""
    inputs = list(tensors(list(arguments.values())))
    for out in tensors(output):
        labelling.set(out, broadcast(labelling, inputs, out.shape))


def _add(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    labelling.added(list(tensors([arguments["self"], arguments["other"]])))
    _pointwise(labelling, arguments, output)


def _same(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    """Operators whose result keeps the shape and the channels of `self`."""
    axes = labelling.get(next(tensors(list(arguments.values()))))
    for out in tensors(output):
        labelling.set(out, axes)


def _spatial(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    """Pooling and resizing: batch and channels stay, pixels change."""
    image = next(tensors(list(arguments.values())))
    axes = labelling.get(image)
    keep = 2 if image.ndim == 4 else image.ndim - 1
    labelling.freeze(axes[keep:])
    for out in tensors(output):
        labelling.set(out, (*axes[:keep], *(None,) * (out.ndim - keep)))


def _convolution(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    image, weight, groups = arguments["input"], arguments["weight"], arguments["groups"]
    in_axes, weight_axes = labelling.get(image), labelling.get(weight)
    channels, outputs = in_axes[1], weight_axes[0]
    labelling.freeze(in_axes[2:])
    read = None  # grouped: every output channel reads a fixed number of inputs, unless groups are thinned out
    if arguments["transposed"]:
        labelling.freeze((channels, *weight_axes))
    elif groups == 1:
        labelling.tie(channels, weight_axes[1])
        read = weight_axes[1]
    elif groups == weight.shape[0] == image.shape[1]:
        labelling.tie(channels, outputs)
    elif groups < FEWEST_GROUPS and channels is not None and outputs is not None:
        read = _thin_groups(labelling, channels, outputs, groups)
        labelling.tie(read, weight_axes[1])
    else:
        _tie_groups(labelling, channels, outputs, groups)
        labelling.freeze(weight_axes[1:2])
    if arguments["bias"] is not None:
        labelling.tie(outputs, labelling.get(arguments["bias"])[0])
    labelling.set(output, (in_axes[0], outputs, *(None,) * (output.ndim - 2)))
    pixels = math.prod(output.shape[2:]) * math.prod(weight.shape[2:])
    # attention within windows folds them into the batch
    dims = [(pixels, None), (output.shape[0], in_axes[0]), (weight.shape[0], outputs), (weight.shape[1], read)]
    labelling.made(output)
    labelling.call("conv", dims, groups=groups, inputs=channels, outputs=outputs)


def _tie_groups(labelling: Labelling, inputs: Labels | None, outputs: Labels | None, groups: int) -> None:
    """Make all channels that a group reads and writes one unit: a convolution in many groups loses whole ones."""
    if inputs is None or outputs is None:
        labelling.freeze((inputs, outputs))
        return
    units = np.concatenate([inputs.reshape(groups, -1), outputs.reshape(groups, -1)], axis=1)
    labelling.tie(units.ravel(), np.repeat(units[:, 0], units.shape[1]))


def _thin_groups(labelling: Labelling, inputs: Labels, outputs: Labels, groups: int) -> Labels:
    """Tie the channels of few groups, which all stay and lose the same ones each; return those that a filter reads."""
    for channels in (inputs, outputs):
        labelling.tie(channels, np.tile(channels[: len(channels) // groups], groups))
    return inputs[: len(inputs) // groups]


def _matmul(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    """A product … N×K by … K×M, perhaps added to something; leading dimensions are a batch that both share."""
    *added, a, b = tensors(list(arguments.values()))
    axes_a, axes_b = labelling.get(a), labelling.get(b)
    labelling.tie(axes_a[-1], axes_b[-2])
    batch = broadcast(labelling, [_leading(labelling, a), _leading(labelling, b)], output.shape[:-2])
    labelling.set(output, (*batch, axes_a[-2], axes_b[-1]))
    lengths = (*output.shape[:-2], a.shape[-2], a.shape[-1], b.shape[-1])
    dims = list(zip(lengths, (*batch, axes_a[-2], axes_a[-1], axes_b[-1]), strict=True))
    # the labels that a narrower network has fewer of come last in `dims`: keep those two when there are three
    dims.sort(key=lambda dim: dim[1] is None)
    labelling.call("matmul", dims, groups=1, inputs=axes_a[-1], outputs=axes_b[-1])
    if added:
        labelling.set(output, broadcast(labelling, [output, *added], output.shape))


def _leading(labelling: Labelling, tensor: Tensor) -> Tensor:
    """Return a stand-in with the batch dimensions of `tensor` alone, labels included."""
    lead = torch.empty(tensor.shape[:-2], device="meta")
    labelling.set(lead, labelling.get(tensor)[:-2])
    return lead


def _batch_norm(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    image = arguments["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if arguments.get(name) is not None:
            labelling.tie(labelling.get(image)[1], labelling.get(arguments[name])[0])
    labelling.normalised(image)
    _normalised(labelling, image, output)


def _layer_norm(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    image = arguments["input"]
    for name in ("weight", "bias"):
        if arguments.get(name) is not None:
            parameter = arguments[name]
            for axis, labels in zip(labelling.get(image)[-parameter.ndim :], labelling.get(parameter), strict=True):
                labelling.tie(axis, labels)
    _normalised(labelling, image, output)


def _group_norm(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    image, groups = arguments["input"], arguments["group"]
    channels = labelling.get(image)[1]
    if channels is not None and groups > 1:
        # the number of groups stays: the j-th channels of all groups go together
        labelling.tie(channels, np.tile(channels[: len(channels) // groups], groups))
    for name in ("weight", "bias"):
        if arguments.get(name) is not None:
            labelling.tie(channels, labelling.get(arguments[name])[0])
    _normalised(labelling, image, output)


def _normalised(labelling: Labelling, image: Tensor, output: Any) -> None:
    first, *statistics = tensors(output)
    labelling.set(first, labelling.get(image))
    for tensor in statistics:
        labelling.set(tensor, (None,) * tensor.ndim)


def _reduce(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    image = arguments["self"]
    dims = arguments.get("dim")
    dims = range(image.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % image.ndim for dim in dims} if image.ndim else set()
    axes = labelling.get(image)
    kept = [axes[dim] for dim in range(image.ndim) if dim not in gone]
    whole = [None if dim in gone else axes[dim] for dim in range(image.ndim)]
    for out in tensors(output):
        labelling.set(out, whole if out.ndim == image.ndim else kept)


_GROUPS: tuple[tuple[Rule, str], ...] = (
    *SHAPE_RULES,
    (_convolution, "convolution"),
    (_matmul, "mm bmm addmm baddbmm"),
    (_batch_norm, "native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    (_layer_norm, "native_layer_norm"),
    (_group_norm, "native_group_norm"),
    (_reduce, "mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm prod argmax logsumexp"),
    (_add, "add"),
    # torch tags these as pointwise in no version, or (leaky_relu) in no old one
    (_pointwise, "where masked_fill sub mul div hardswish hardsigmoid hardtanh relu6 leaky_relu prelu _prelu_kernel"),
    (_same, "clone detach alias contiguous _to_copy lift_fresh _softmax _log_softmax native_dropout dropout"),
    (
        _spatial,
        "max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d"
        " upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d"
        " _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d",
    ),
)
_RULES: dict[str, Rule] = {name: rule for rule, names in _GROUPS for name in names.split()}


def rule_of(operator: Any) -> Rule | None:
    """Return the rule of an ATen operator, in place or not; None where it has none."""
    name = operator._schema.name.removeprefix("aten::")
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    return _pointwise if rule is None and torch.Tag.pointwise in operator.tags else rule
