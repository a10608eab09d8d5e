"""Which channels of a network belong together, found by one forward pass on the meta device.

Every channel of every tensor carries an integer label. An operator passes labels on (a ReLU, a pooling, a slice),
creates them (the output channels of a convolution) or ties them (the two sides of a residual sum). Channels that end
with the same label can only be dropped together; such a set is called a *unit* below. Label 0, `FROZEN`, is for
channels that must stay: the image, the logits, and whatever goes through an operator that is not understood.

A miniature: `conv1: 3→2, conv2: 2→2, y = conv2(relu(conv1(x))) + conv1(x)` gives conv1's weight the labels
`([1, 2], FROZEN)` and conv2's weight `([1, 2], [1, 2])`: two units, each in four places.

The pass runs below autograd on ATen operators, of which convolutional networks use some forty, so that functional
calls, custom layers and re-standardised weights need no rule of their own.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nas_kd.errors import ModelError

FROZEN = 0
SECONDS_LIMIT = 20.0  # no covered model takes 3 s; a network that loops over pixels in Python would never end

Labels = NDArray[np.int64]
Axes = tuple[Labels | None, ...]  # one entry per dimension; None: not channels (batch, height, width, kernel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One convolution or matrix product of the forward pass.

    Its MACs are `factor` times the product of the lengths of its `axes` (the labelled dimensions). `module` is the
    innermost module that made it; `inputs` and `outputs` label the channels that it reads and writes; `positions_in`
    and `positions_out` are the pixels of its input and output.
    """

    module: str
    kind: str  # "conv" or "matmul"
    groups: int
    factor: int
    axes: tuple[Labels, ...]
    inputs: Labels | None
    outputs: Labels | None
    positions_in: int
    positions_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What enters and leaves a module the first time it runs: shapes and labels of its first input and output."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: Axes
    out_axes: Axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one forward pass tells: labels of every parameter and buffer, the calls, and where channels are split."""

    axes: dict[str, Axes]
    calls: tuple[Call, ...]
    splits: tuple[tuple[Labels, ...], ...]
    unknown: tuple[tuple[str, str], ...]  # (module, operator) that froze channels
    flows: dict[str, Flow]  # by module path; also "forward_features" and "pre_logits" of the whole network


def trace(network: nn.Module, input_size: Sequence[int], *, clock: Callable[[], float] = time.monotonic) -> Trace:
    """Labels the channels of `network` for images of `input_size` (C, H, W). The network is not changed.

    Raises ModelError when the forward pass fails at this size or takes longer than `SECONDS_LIMIT`.
    """
    meta = copy.deepcopy(network).to("meta").eval()
    tracer = _Tracer(meta, clock)
    hooks = list(_follow_modules(meta, tracer))
    image = torch.empty((1, *input_size), device="meta")
    tracer.set(image, (None, np.full(input_size[0], FROZEN), None, None))
    try:
        with torch.no_grad(), tracer:
            output = meta(image)
    except ModelError:
        raise
    except Exception as error:
        size = "×".join(map(str, input_size))
        raise ModelError(
            f"{type(network).__name__} cannot run on {size} images: {_first_line(error)}; "
            "try a larger --img-size, or a smaller --reduction"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for tensor in _tensors(output):
        tracer.freeze(tracer.get(tensor))
    _trace_heads(meta, image, tracer)
    return tracer.result()


def _trace_heads(network: Any, image: Tensor, tracer: _Tracer) -> None:
    """Labels what timm's `forward_features` and `forward_head(pre_logits=True)` return, where a model has them."""
    if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
        return
    calls = tracer.calls.copy()
    with torch.no_grad(), tracer:
        features = network.forward_features(image)
        tracer.note("forward_features", image, features)
        tracer.note("pre_logits", features, network.forward_head(features, pre_logits=True))
    tracer.calls = calls


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _follow_modules(network: nn.Module, tracer: _Tracer) -> Iterator[Any]:
    """Hooks that keep `tracer.stack` at the innermost running module and note what each sees."""
    for name, module in network.named_modules():

        def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
            tracer.stack.append(name)

        def leave(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            tracer.stack.pop()
            tracer.note(name, inputs, output)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class _Tracer(TorchDispatchMode):
    """Runs each operator, then passes the labels on. Unions are kept in an array of parents, smaller label first, so
    that FROZEN is always the root of what it touches."""

    def __init__(self, network: nn.Module, clock: Callable[[], float]) -> None:
        super().__init__()
        self._parent = np.zeros(1024, dtype=np.int64)
        self._count = 1  # label 0 is FROZEN
        self._labels: dict[int, tuple[Tensor, Axes]] = {}  # by id; the tensor is held so that its id stays its own
        tensors = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
        self._named = {name: tensor for name, tensor in tensors}
        self._owned = {id(tensor) for tensor in self._named.values()}
        self.calls: list[Call] = []
        self._splits: list[tuple[Labels, ...]] = []
        self._unknown: dict[tuple[str, str], None] = {}
        self._flows: dict[str, Flow] = {}
        self.stack: list[str] = [""]
        self._clock = clock
        self._deadline = clock() + SECONDS_LIMIT
        self._name = type(network).__name__

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._clock() > self._deadline:
            raise ModelError(f"{self._name} takes longer than {SECONDS_LIMIT:.0f} s to analyse: it is not supported")
        _propagate(self, func, _arguments(func, args, kwargs or {}), output)
        return output

    # labels of tensors

    def get(self, tensor: Tensor) -> Axes:
        """The labels of a tensor; a parameter or buffer seen for the first time gets new ones."""
        if id(tensor) not in self._labels:
            self.set(tensor, self._new_axes(tensor) if id(tensor) in self._owned else (None,) * tensor.ndim)
        return self._labels[id(tensor)][1]

    def set(self, tensor: Tensor, axes: Sequence[Labels | None]) -> None:
        self._labels[id(tensor)] = (tensor, tuple(axes))

    def _new_axes(self, tensor: Tensor) -> Axes:
        """Labels for dimensions 0 and 1 of a parameter (a kernel's height and width are no channels)."""
        return tuple(self.fresh(size) if dim < 2 and size > 1 else None for dim, size in enumerate(tensor.shape))

    # labels themselves

    def fresh(self, count: int) -> Labels:
        while self._count + count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
        labels = np.arange(self._count, self._count + count)
        self._parent[labels] = labels
        self._count += count
        return labels

    def find(self, labels: Labels) -> Labels:
        roots = self._parent[labels]
        while not np.array_equal(roots, above := self._parent[roots]):
            roots = above
        self._parent[labels] = roots
        return roots

    def tie(self, a: Labels | None, b: Labels | None) -> None:
        """Makes a[i] and b[i] one label. Tied to something that is no channel, labels freeze."""
        if a is None or b is None:
            self.freeze((a, b))
            return
        while True:
            roots_a, roots_b = self.find(a), self.find(b)
            if np.array_equal(roots_a, roots_b):
                return
            # pairs may share a root, and then only one of them is joined: repeat until all are
            np.minimum.at(self._parent, np.maximum(roots_a, roots_b), np.minimum(roots_a, roots_b))

    def freeze(self, axes: Sequence[Labels | None]) -> None:
        for labels in axes:
            if labels is not None:
                self.tie(labels, np.full(len(labels), FROZEN))

    # what the rules report

    def call(self, kind: str, dims: Sequence[tuple[int, Labels | None]], **facts: Any) -> None:
        """Notes a product over `dims`, each a length and its labels; a third labelled one is frozen."""
        labelled = [labels for _, labels in dims if labels is not None]
        self.freeze(labelled[2:])
        plain = [size for size, labels in dims if labels is None] + [len(labels) for labels in labelled[2:]]
        module = self.stack[-1]
        call = Call(module=module, kind=kind, factor=math.prod(plain), axes=tuple(labelled[:2]), **facts)
        self.calls.append(call)

    def note(self, name: str, inputs: Any, output: Any) -> None:
        first, last = next(_tensors(inputs), None), next(_tensors(output), None)
        if first is None or last is None or name in self._flows:
            return
        shapes = tuple(first.shape), tuple(last.shape)
        self._flows[name] = Flow(
            in_shape=shapes[0], out_shape=shapes[1], in_axes=self.get(first), out_axes=self.get(last)
        )

    def split(self, parts: Sequence[Labels]) -> None:
        self._splits.append(tuple(parts))

    def give_up(self, func: Any, arguments: dict[str, Any]) -> None:
        """An operator without a rule: its labelled inputs freeze, its outputs carry no labels."""
        axes = [labels for tensor in _tensors(list(arguments.values())) for labels in self.get(tensor)]
        if any((self.find(labels) != FROZEN).any() for labels in axes if labels is not None):
            self._unknown[self.stack[-1], str(func)] = None
        self.freeze(axes)

    def result(self) -> Trace:
        def roots(labels: Labels | None) -> Labels | None:
            return None if labels is None else self.find(labels)

        def final(call: Call) -> Call:
            axes = tuple(self.find(labels) for labels in call.axes)
            return replace(call, axes=axes, inputs=roots(call.inputs), outputs=roots(call.outputs))

        def settled(flow: Flow) -> Flow:
            axes = {"in_axes": tuple(map(roots, flow.in_axes)), "out_axes": tuple(map(roots, flow.out_axes))}
            return replace(flow, **axes)

        seen = {name: self._labels[id(t)][1] for name, t in self._named.items() if id(t) in self._labels}
        return Trace(
            axes={name: tuple(map(roots, axes)) for name, axes in seen.items()},
            calls=tuple(map(final, self.calls)),
            splits=tuple(tuple(self.find(part) for part in parts) for parts in self._splits),
            unknown=tuple(self._unknown),
            flows={name: settled(flow) for name, flow in self._flows.items()},
        )


def _arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments by their names in its schema, defaults filled in."""
    named = {arg.name: arg.default_value for arg in func._schema.arguments if arg.has_default_value()}
    named.update(zip((arg.name for arg in func._schema.arguments), args, strict=False))
    return named | kwargs


def _propagate(tracer: _Tracer, func: Any, arguments: dict[str, Any], output: Any) -> None:
    name = func._schema.name.removeprefix("aten::")
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _pointwise
    if rule is None:
        tracer.give_up(func, arguments)
    else:
        rule(tracer, arguments, output)


def _pointwise(tracer: _Tracer, arguments: dict[str, Any], output: Any) -> None:
    inputs = list(_tensors(list(arguments.values())))
    for out in _tensors(output):
        tracer.set(out, _broadcast(tracer, inputs, out.shape))


def _broadcast(tracer: _Tracer, inputs: Sequence[Tensor], shape: Sequence[int]) -> list[Labels | None]:
    """Labels of an elementwise result; dimensions that meet are tied."""
    axes: list[Labels | None] = []
    for from_right in range(len(shape), 0, -1):
        meeting = [tracer.get(t)[-from_right] for t in inputs if t.ndim >= from_right and t.shape[-from_right] != 1]
        labelled = next((labels for labels in meeting if labels is not None), None)
        if labelled is not None:
            for labels in meeting:
                tracer.tie(labelled, labels)
        axes.append(labelled)
    return axes


def _same(tracer: _Tracer, arguments: dict[str, Any], output: Any) -> None:
    """Operators whose result keeps the shape and the channels of `self`."""
    axes = tracer.get(next(_tensors(list(arguments.values()))))
    for out in _tensors(output):
        tracer.set(out, axes)


def _spatial(tracer: _Tracer, arguments: dict[str, Any], output: Any) -> None:
    """Pooling and resizing: batch and channels stay, pixels change."""
    image = next(_tensors(list(arguments.values())))
    axes = tracer.get(image)
    keep = 2 if image.ndim == 4 else image.ndim - 1
    tracer.freeze(axes[keep:])
    for out in _tensors(output):
        tracer.set(out, (*axes[:keep], *(None,) * (out.ndim - keep)))


def _convolution(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    image, weight, groups = arguments["input"], arguments["weight"], arguments["groups"]
    in_axes, weight_axes = tracer.get(image), tracer.get(weight)
    channels, outputs = in_axes[1], weight_axes[0]
    tracer.freeze(in_axes[2:])
    if arguments["transposed"]:
        tracer.freeze((channels, *weight_axes))
    elif groups == 1:
        tracer.tie(channels, weight_axes[1])
    elif groups == weight.shape[0] == image.shape[1]:
        tracer.tie(channels, outputs)
    else:
        _tie_groups(tracer, channels, outputs, groups)
        tracer.freeze(weight_axes[1:2])
    if arguments["bias"] is not None:
        tracer.tie(outputs, tracer.get(arguments["bias"])[0])
    tracer.set(output, (in_axes[0], outputs, *(None,) * (output.ndim - 2)))
    positions = math.prod(output.shape[2:])
    kernel = math.prod(weight.shape[2:])
    dims = [(positions * kernel, None), (weight.shape[0], outputs)]
    # grouped: every output channel reads a fixed number of inputs
    dims.append((weight.shape[1], weight_axes[1] if groups == 1 else None))
    tracer.call(
        "conv",
        dims,
        groups=groups,
        inputs=channels,
        outputs=outputs,
        positions_in=math.prod(image.shape[2:]),
        positions_out=positions,
    )


def _tie_groups(tracer: _Tracer, inputs: Labels | None, outputs: Labels | None, groups: int) -> None:
    """A grouped convolution loses whole groups: all channels that a group reads and writes are one unit."""
    if inputs is None or outputs is None:
        tracer.freeze((inputs, outputs))
        return
    units = np.concatenate([inputs.reshape(groups, -1), outputs.reshape(groups, -1)], axis=1)
    tracer.tie(units.ravel(), np.repeat(units[:, 0], units.shape[1]))


def _matmul(tracer: _Tracer, a: Tensor, b: Tensor, output: Tensor) -> None:
    """A product … N×K by … K×M; leading dimensions are a batch that both share."""
    axes_a, axes_b = tracer.get(a), tracer.get(b)
    tracer.tie(axes_a[-1], axes_b[-2])
    batch = _broadcast(tracer, [_leading(tracer, a), _leading(tracer, b)], output.shape[:-2])
    tracer.set(output, (*batch, axes_a[-2], axes_b[-1]))
    lengths = (*output.shape[:-2], a.shape[-2], a.shape[-1], b.shape[-1])
    dims = list(zip(lengths, (*batch, axes_a[-2], axes_a[-1], axes_b[-1]), strict=True))
    rows = math.prod(output.shape[:-1])
    # the labels that a narrower network has fewer of come last in `dims`: keep those two when there are three
    dims.sort(key=lambda dim: dim[1] is None)
    tracer.call("matmul", dims, groups=1, inputs=axes_a[-1], outputs=axes_b[-1], positions_in=rows, positions_out=rows)


def _leading(tracer: _Tracer, tensor: Tensor) -> Tensor:
    """A stand-in with the batch dimensions of `tensor` alone, labels included."""
    lead = torch.empty(tensor.shape[:-2], device="meta")
    tracer.set(lead, tracer.get(tensor)[:-2])
    return lead


def _mm(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    _matmul(tracer, arguments["self"], arguments["mat2"], output)


def _addmm(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    _matmul(tracer, arguments["mat1"], arguments["mat2"], output)
    tracer.set(output, _broadcast(tracer, [output, arguments["self"]], output.shape))


def _baddbmm(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    _matmul(tracer, arguments["batch1"], arguments["batch2"], output)
    tracer.set(output, _broadcast(tracer, [output, arguments["self"]], output.shape))


def _batch_norm(tracer: _Tracer, arguments: dict[str, Any], output: Any) -> None:
    image = arguments["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if arguments.get(name) is not None:
            tracer.tie(tracer.get(image)[1], tracer.get(arguments[name])[0])
    _normalised(tracer, image, output)


def _layer_norm(tracer: _Tracer, arguments: dict[str, Any], output: Any) -> None:
    image = arguments["input"]
    for name in ("weight", "bias"):
        if arguments.get(name) is not None:
            parameter = arguments[name]
            for axis, labels in zip(tracer.get(image)[-parameter.ndim :], tracer.get(parameter), strict=True):
                tracer.tie(axis, labels)
    _normalised(tracer, image, output)


def _group_norm(tracer: _Tracer, arguments: dict[str, Any], output: Any) -> None:
    image, groups = arguments["input"], arguments["group"]
    channels = tracer.get(image)[1]
    if channels is not None and groups > 1:
        # the number of groups stays: the j-th channels of all groups go together
        tracer.tie(channels, np.tile(channels[: len(channels) // groups], groups))
    for name in ("weight", "bias"):
        if arguments.get(name) is not None:
            tracer.tie(channels, tracer.get(arguments[name])[0])
    _normalised(tracer, image, output)


def _normalised(tracer: _Tracer, image: Tensor, output: Any) -> None:
    first, *statistics = _tensors(output)
    tracer.set(first, tracer.get(image))
    for tensor in statistics:
        tracer.set(tensor, (None,) * tensor.ndim)


def _reduce(tracer: _Tracer, arguments: dict[str, Any], output: Any) -> None:
    image = arguments["self"]
    dims = arguments.get("dim")
    dims = range(image.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % image.ndim for dim in dims} if image.ndim else set()
    axes = tracer.get(image)
    kept = [axes[dim] for dim in range(image.ndim) if dim not in gone]
    whole = [None if dim in gone else axes[dim] for dim in range(image.ndim)]
    for out in _tensors(output):
        tracer.set(out, whole if out.ndim == image.ndim else kept)


def _permute(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    axes = tracer.get(arguments["self"])
    tracer.set(output, [axes[dim] for dim in arguments["dims"]])


def _transpose(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    axes = list(tracer.get(arguments["self"]))
    a, b = (arguments["dim0"], arguments["dim1"]) if "dim0" in arguments else (0, len(axes) - 1)
    axes[a], axes[b] = axes[b], axes[a]
    tracer.set(output, axes)


def _view(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    """Any reshape, squeeze or unsqueeze: dimensions are matched by their products, see `_regroup`."""
    image = arguments["self"]
    axes: list[Labels | None] = [None] * output.ndim
    for old, new in _matching(image.shape, output.shape):
        labels = [tracer.get(image)[dim] for dim in old]
        lengths = [image.shape[dim] for dim in old]
        for dim, result in zip(new, _regroup(tracer, labels, lengths, [output.shape[d] for d in new]), strict=True):
            axes[dim] = result
    tracer.set(output, axes)


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
    tracer: _Tracer, labels: Sequence[Labels | None], old: Sequence[int], new: Sequence[int]
) -> list[Labels | None]:
    """Labels of dimensions `new` made from the dimensions `old` of the same product."""
    if len(old) == len(new) == 1:
        return [labels[0]]
    if all(axis is None for axis in labels):
        return [None] * len(new)
    carriers = [dim for dim, axis in enumerate(labels) if axis is not None]
    if len(carriers) > 1 or (len(old) > 1 and len(new) > 1):
        tracer.freeze(labels)
        return [None] * len(new)
    if len(new) == 1:  # merged: C×H×W → C·H·W repeats every label H·W times
        dim = carriers[0]
        axis = labels[dim]
        assert axis is not None
        return [np.tile(np.repeat(axis, math.prod(old[dim + 1 :])), math.prod(old[:dim]))]
    assert labels[0] is not None
    return _unmerge(tracer, labels[0], new)


def _unmerge(tracer: _Tracer, labels: Labels, new: Sequence[int]) -> list[Labels | None]:
    """Splits one labelled dimension: one of the new ones carries the labels, the others keep their length.

    The carrier is one along which nothing more needs to be tied, or else the last: r·C → r×C ties the r copies.
    """
    array = tracer.find(labels).reshape(new)

    def others(dim: int) -> tuple[int, ...]:
        return tuple(d for d in range(len(new)) if d != dim)

    free = (d for d in reversed(range(len(new))) if (array == array.max(axis=others(d), keepdims=True)).all())
    dim = next(free, len(new) - 1)
    carried = array.min(axis=others(dim))
    shape = [new[d] if d == dim else 1 for d in range(len(new))]
    tracer.tie(array.ravel(), np.broadcast_to(carried.reshape(shape), array.shape).ravel())
    return [carried if d == dim else None for d in range(len(new))]


def _cat(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    parts = [tensor for tensor in arguments["tensors"] if tensor.numel()]
    dim = (arguments.get("dim") or 0) % output.ndim
    axes: list[Labels | None] = []
    for d in range(output.ndim):
        labels = [tracer.get(part)[d] for part in parts]
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
                tracer.tie(labels[0], axis)
            axes.append(labels[0])
    tracer.set(output, axes)


def _stack(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    dim = (arguments.get("dim") or 0) % output.ndim
    parts = arguments["tensors"]
    axes = _broadcast(tracer, parts, parts[0].shape)
    tracer.set(output, (*axes[:dim], None, *axes[dim:]))


def _split(tracer: _Tracer, arguments: dict[str, Any], output: Sequence[Tensor]) -> None:
    image = arguments["self"]
    dim = arguments["dim"] % image.ndim
    axes = tracer.get(image)
    start, parts = 0, []
    for part in output:
        length = part.shape[dim]
        labels = axes[dim]
        piece = None if labels is None else labels[start : start + length]
        parts.append(piece)
        start += length
        tracer.set(part, (*axes[:dim], piece, *axes[dim + 1 :]))
    pieces = [piece for piece in parts if piece is not None]
    if len(pieces) > 1:
        tracer.split(pieces)


def _slice(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    image = arguments["self"]
    dim = arguments["dim"] % image.ndim
    axes = list(tracer.get(image))
    labels = axes[dim]
    if labels is not None:
        chosen = slice(arguments["start"], arguments["end"], arguments["step"])
        rest = np.delete(labels, np.arange(len(labels))[chosen])
        axes[dim] = labels[chosen]
        if len(rest):
            tracer.split([labels[chosen], rest])
    tracer.set(output, axes)


def _select(tracer: _Tracer, arguments: dict[str, Any], output: Any) -> None:
    """`select` and `unbind`: one index of a dimension; of a labelled one, a fixed channel that must stay."""
    image = arguments["self"]
    dim = arguments["dim"] % image.ndim
    axes = tracer.get(image)
    tracer.freeze(axes[dim : dim + 1])
    for out in _tensors(output):
        tracer.set(out, (*axes[:dim], *axes[dim + 1 :]))


def _expand(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    image = arguments["self"]
    added = output.ndim - image.ndim
    axes = tracer.get(image)
    tracer.set(output, (*(None,) * added, *axes))


def _pad(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    """Constant padding; padded channels (the option-A shortcut of CIFAR ResNets) are frozen ones."""
    image, pad = arguments["self"], arguments["pad"]
    axes = list(tracer.get(image))
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = image.ndim - 1 - number
        labels = axes[dim]
        if labels is not None:
            kept = labels[max(0, -before) : len(labels) - max(0, -after)]
            axes[dim] = np.concatenate([np.full(max(0, before), FROZEN), kept, np.full(max(0, after), FROZEN)])
    tracer.set(output, axes)


def _flip(tracer: _Tracer, arguments: dict[str, Any], output: Tensor) -> None:
    axes = list(tracer.get(arguments["self"]))
    for dim in arguments["dims"]:
        labels = axes[dim]
        axes[dim] = None if labels is None else labels[::-1].copy()
    tracer.set(output, axes)


_Rule = Callable[[_Tracer, dict[str, Any], Any], None]
_GROUPS: tuple[tuple[_Rule, str], ...] = (
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
    (_pad, "constant_pad_nd"),
    (_flip, "flip"),
    (_stack, "stack"),
    (_pointwise, "where masked_fill add sub mul div hardswish hardsigmoid hardtanh relu6 prelu _prelu_kernel"),
    (_same, "clone detach alias contiguous _to_copy lift_fresh _softmax _log_softmax native_dropout dropout"),
    (
        _spatial,
        "max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d"
        " upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d"
        " _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d",
    ),
)
_RULES: dict[str, _Rule] = {name: rule for rule, names in _GROUPS for name in names.split()}
