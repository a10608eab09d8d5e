"""What operators that reorder, cut or join dimensions do to the labels of channels; `operators` has the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nas_kd.analysis.labels import FROZEN, Labelling, Labels, tensors

Rule = Callable[[Labelling, dict[str, Any], Any], None]  # of an operator's named arguments and its output


def broadcast(labelling: Labelling, inputs: Sequence[Tensor], shape: Sequence[int]) -> list[Labels | None]:
    """Return the labels of an elementwise result; dimensions that meet are tied."""
    axes: list[Labels | None] = []
    for from_right in range(len(shape), 0, -1):
        meeting = [labelling.get(t)[-from_right] for t in inputs if t.ndim >= from_right and t.shape[-from_right] != 1]
        labelled = next((labels for labels in meeting if labels is not None), None)
        if labelled is not None:
            for labels in meeting:
                labelling.tie(labelled, labels)
        axes.append(labelled)
    return axes


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
    """Yield runs of dimensions of equal product, without those of length 1: (2, 6, 1) and (2, 3, 2) → 0:0 and 1:1,2."""
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
    """Return the labels of dimensions `new` made from the dimensions `old` of the same product."""
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
    """Split one labelled dimension: one of the new ones carries the labels, the others keep their length.

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
    axes = broadcast(labelling, parts, parts[0].shape)
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
        labelling.set(output, labelling.get(image))
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


SHAPE_RULES: tuple[tuple[Rule, str], ...] = (
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
)
