"""What each ATen operator does to the labels of channels: pass them on, tie them, or freeze them.

Convolutional networks use some forty operators; whatever is not listed in `RULES` freezes what goes through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas_kd.models.labels import FROZEN, Labelling, Labels, tensors

FEWEST_GROUPS = 3  # a convolution in fewer is thinned out inside its groups: whole ones would leave half or nothing


def pointwise(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    """Any elementwise operator: dimensions that meet are tied."""
    inputs = list(tensors(list(arguments.values())))
    for out in tensors(output):
        labelling.set(out, _broadcast(labelling, inputs, out.shape))


def _broadcast(labelling: Labelling, inputs: Sequence[Tensor], shape: Sequence[int]) -> list[Labels | None]:
    """Labels of an elementwise result; dimensions that meet are tied."""
    axes: list[Labels | None] = []
    for from_right in range(len(shape), 0, -1):
        meeting = [labelling.get(t)[-from_right] for t in inputs if t.ndim >= from_right and t.shape[-from_right] != 1]
        labelled = next((labels for labels in meeting if labels is not None), None)
        if labelled is not None:
            for labels in meeting:
                labelling.tie(labelled, labels)
        axes.append(labelled)
    return axes


def _add(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    labelling.added(list(tensors([arguments["self"], arguments["other"]])))
    pointwise(labelling, arguments, output)


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
    """A convolution in many groups loses whole ones: all channels that a group reads and writes are one unit."""
    if inputs is None or outputs is None:
        labelling.freeze((inputs, outputs))
        return
    units = np.concatenate([inputs.reshape(groups, -1), outputs.reshape(groups, -1)], axis=1)
    labelling.tie(units.ravel(), np.repeat(units[:, 0], units.shape[1]))


def _thin_groups(labelling: Labelling, inputs: Labels, outputs: Labels, groups: int) -> Labels:
    """A convolution in few groups keeps them all, and each of them loses the same channels. Gives those it reads."""
    for channels in (inputs, outputs):
        labelling.tie(channels, np.tile(channels[: len(channels) // groups], groups))
    return inputs[: len(inputs) // groups]


def _matmul(labelling: Labelling, a: Tensor, b: Tensor, output: Tensor) -> None:
    """A product … N×K by … K×M; leading dimensions are a batch that both share."""
    axes_a, axes_b = labelling.get(a), labelling.get(b)
    labelling.tie(axes_a[-1], axes_b[-2])
    batch = _broadcast(labelling, [_leading(labelling, a), _leading(labelling, b)], output.shape[:-2])
    labelling.set(output, (*batch, axes_a[-2], axes_b[-1]))
    lengths = (*output.shape[:-2], a.shape[-2], a.shape[-1], b.shape[-1])
    dims = list(zip(lengths, (*batch, axes_a[-2], axes_a[-1], axes_b[-1]), strict=True))
    # the labels that a narrower network has fewer of come last in `dims`: keep those two when there are three
    dims.sort(key=lambda dim: dim[1] is None)
    labelling.call("matmul", dims, groups=1, inputs=axes_a[-1], outputs=axes_b[-1])


def _leading(labelling: Labelling, tensor: Tensor) -> Tensor:
    """A stand-in with the batch dimensions of `tensor` alone, labels included."""
    lead = torch.empty(tensor.shape[:-2], device="meta")
    labelling.set(lead, labelling.get(tensor)[:-2])
    return lead


def _mm(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    _matmul(labelling, arguments["self"], arguments["mat2"], output)


def _addmm(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    _matmul(labelling, arguments["mat1"], arguments["mat2"], output)
    labelling.set(output, _broadcast(labelling, [output, arguments["self"]], output.shape))


def _baddbmm(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    _matmul(labelling, arguments["batch1"], arguments["batch2"], output)
    labelling.set(output, _broadcast(labelling, [output, arguments["self"]], output.shape))


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


def _permute(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    axes = labelling.get(arguments["self"])
    labelling.set(output, [axes[dim] for dim in arguments["dims"]])


def _transpose(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    axes = list(labelling.get(arguments["self"]))
    a, b = (arguments["dim0"], arguments["dim1"]) if "dim0" in arguments else (0, len(axes) - 1)
    axes[a], axes[b] = axes[b], axes[a]
    labelling.set(output, axes)


def _view(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    """Any reshape, squeeze or unsqueeze: dimensions are matched by their products, see `_regroup`."""
    image = arguments["self"]
    axes: list[Labels | None] = [None] * output.ndim
    for old, new in _matching(image.shape, output.shape):
        labels = [labelling.get(image)[dim] for dim in old]
        lengths = [image.shape[dim] for dim in old]
        for dim, result in zip(new, _regroup(labelling, labels, lengths, [output.shape[d] for d in new]), strict=True):
            axes[dim] = result
    labelling.set(output, axes)


def _matching(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of dimensions of equal product, length-1 dimensions left out: (2, 6, 1) and (2, 3, 2) → 0:0 and 1:1,2."""
    left = [dim for dim, size in enumerate(old) if size != 1]
    right = [dim for dim, size in enumerate(new) if size != 1]
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (product_a := math.prod(old[d] for d in a)) != (product_b := math.prod(new[d] for d in b)):
            a.append(left.pop(0)) if product_a < product_b else b.append(right.pop(0))
        yield a, b


def _regroup(
    labelling: Labelling, labels: Sequence[Labels | None], old: Sequence[int], new: Sequence[int]
) -> list[Labels | None]:
    """Labels of dimensions `new` made from the dimensions `old` of the same product."""
    if len(old) == len(new) == 1:
        return [labels[0]]
    if all(axis is None for axis in labels):
        return [None] * len(new)
    carriers = [dim for dim, axis in enumerate(labels) if axis is not None]
    if len(carriers) > 1 or (len(old) > 1 and len(new) > 1):
        labelling.freeze(labels)
        return [None] * len(new)
    if len(new) == 1:  # merged: C×H×W → C·H·W repeats every label H·W times
        dim = carriers[0]
        axis = labels[dim]
        assert axis is not None
        return [np.tile(np.repeat(axis, math.prod(old[dim + 1 :])), math.prod(old[:dim]))]
    assert labels[0] is not None
    return _unmerge(labelling, labels[0], new)


def _unmerge(labelling: Labelling, labels: Labels, new: Sequence[int]) -> list[Labels | None]:
    """Splits one labelled dimension: one of the new ones carries the labels, the others keep their length.

    The carrier is one along which nothing more needs to be tied, or else the last: r·C → r×C ties the r copies.
    """
    array = labelling.find(labels).reshape(new)

    def others(dim: int) -> tuple[int, ...]:
        return tuple(d for d in range(len(new)) if d != dim)

    free = (d for d in reversed(range(len(new))) if (array == array.max(axis=others(d), keepdims=True)).all())
    dim = next(free, len(new) - 1)
    carried = array.min(axis=others(dim))
    shape = [new[d] if d == dim else 1 for d in range(len(new))]
    labelling.tie(array.ravel(), np.broadcast_to(carried.reshape(shape), array.shape).ravel())
    return [carried if d == dim else None for d in range(len(new))]


def _cat(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    parts = [tensor for tensor in arguments["tensors"] if tensor.numel()]
    dim = (arguments.get("dim") or 0) % output.ndim
    axes: list[Labels | None] = []
    for d in range(output.ndim):
        labels = [labelling.get(part)[d] for part in parts]
        if all(axis is None for axis in labels):
            axes.append(None)
        elif d == dim:
            filled = [
                np.full(part.shape[d], FROZEN) if axis is None else axis
                for part, axis in zip(parts, labels, strict=True)
            ]
            axes.append(np.concatenate(filled))
        else:
            for axis in labels[1:]:
                labelling.tie(labels[0], axis)
            axes.append(labels[0])
    labelling.set(output, axes)


def _stack(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    dim = (arguments.get("dim") or 0) % output.ndim
    parts = arguments["tensors"]
    axes = _broadcast(labelling, parts, parts[0].shape)
    labelling.set(output, (*axes[:dim], None, *axes[dim:]))


def _split(labelling: Labelling, arguments: dict[str, Any], output: Sequence[Tensor]) -> None:
    image = arguments["self"]
    dim = arguments["dim"] % image.ndim
    axes = labelling.get(image)
    start, parts = 0, []
    for part in output:
        length = part.shape[dim]
        labels = axes[dim]
        piece = None if labels is None else labels[start : start + length]
        parts.append(piece)
        start += length
        labelling.set(part, (*axes[:dim], piece, *axes[dim + 1 :]))
    pieces = [piece for piece in parts if piece is not None]
    if len(pieces) > 1:
        labelling.split(pieces)


def _slice(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    image = arguments["self"]
    dim = arguments["dim"] % image.ndim
    axes = list(labelling.get(image))
    labels = axes[dim]
    if labels is not None:
        chosen = slice(arguments["start"], arguments["end"], arguments["step"])
        rest = np.delete(labels, np.arange(len(labels))[chosen])
        axes[dim] = labels[chosen]
        if len(rest):
            labelling.split([labels[chosen], rest])
    labelling.set(output, axes)


def _select(labelling: Labelling, arguments: dict[str, Any], output: Any) -> None:
    """`select` and `unbind`: one index of a dimension; of a labelled one, a fixed channel that must stay."""
    image = arguments["self"]
    dim = arguments["dim"] % image.ndim
    axes = labelling.get(image)
    labelling.freeze(axes[dim : dim + 1])
    for out in tensors(output):
        labelling.set(out, (*axes[:dim], *axes[dim + 1 :]))


def _as_strided(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    """Another layout in memory, as torch gives to pooled channels-last images; what may change the order freezes."""
    image = arguments["self"]
    if output.shape == image.shape and sum(length > 1 for length in output.shape) <= 1:
        _same(labelling, {"self": image}, output)
    else:
        labelling.give_up("aten.as_strided", [image])


def _expand(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    image = arguments["self"]
    added = output.ndim - image.ndim
    axes = labelling.get(image)
    labelling.set(output, (*(None,) * added, *axes))


def _pad(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    """Constant padding; padded channels (the option-A shortcut of CIFAR ResNets) are frozen ones."""
    image, pad = arguments["self"], arguments["pad"]
    axes = list(labelling.get(image))
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = image.ndim - 1 - number
        labels = axes[dim]
        if labels is not None:
            kept = labels[max(0, -before) : len(labels) - max(0, -after)]
            axes[dim] = np.concatenate([np.full(max(0, before), FROZEN), kept, np.full(max(0, after), FROZEN)])
    labelling.set(output, axes)


def _flip(labelling: Labelling, arguments: dict[str, Any], output: Tensor) -> None:
    axes = list(labelling.get(arguments["self"]))
    for dim in arguments["dims"]:
        labels = axes[dim]
        axes[dim] = None if labels is None else labels[::-1].copy()
    labelling.set(output, axes)


Rule = Callable[[Labelling, dict[str, Any], Any], None]
_GROUPS: tuple[tuple[Rule, str], ...] = (
    (_convolution, "convolution"),
    (_mm, "mm bmm"),
    (_addmm, "addmm"),
    (_baddbmm, "baddbmm"),
    (_batch_norm, "native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    (_layer_norm, "native_layer_norm"),
    (_group_norm, "native_group_norm"),
    (_reduce, "mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm prod argmax logsumexp"),
    (_permute, "permute"),
    (_transpose, "transpose t"),
    (_view, "view _unsafe_view reshape _reshape_alias squeeze unsqueeze"),
    (_cat, "cat"),
    (_split, "split split_with_sizes unsafe_split split_with_sizes_copy"),
    (_slice, "slice"),
    (_select, "select unbind"),
    (_expand, "expand"),
    (_as_strided, "as_strided"),
    (_pad, "constant_pad_nd"),
    (_flip, "flip"),
    (_stack, "stack"),
    (_add, "add"),
    (pointwise, "where masked_fill sub mul div hardswish hardsigmoid hardtanh relu6 prelu _prelu_kernel"),
    (_same, "clone detach alias contiguous _to_copy lift_fresh _softmax _log_softmax native_dropout dropout"),
    (
        _spatial,
        "max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d"
        " upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d"
        " _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d",
    ),
)
RULES: dict[str, Rule] = {name: rule for rule, names in _GROUPS for name in names.split()}
