"""Labels of channels, and what a forward pass says about them.

Every channel of every tensor carries an integer label. An operator passes labels on (a ReLU, a pooling, a slice),
creates them (the output channels of a convolution) or ties them (the two sides of a residual sum). Channels that end
with the same label can only be dropped together; such a set is called a *unit*. Label 0, `FROZEN`, is for channels
that must stay: the image, the logits, and whatever goes through an operator that is not understood.

A miniature: `conv1: 3→2, conv2: 2→2, y = conv2(relu(conv1(x))) + conv1(x)` gives conv1's weight the labels
`([1, 2], FROZEN)` and conv2's weight `([1, 2], [1, 2])`: two units, each in four places.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nas_kd.analysis.schedule import Activations

FROZEN = 0
_NESTED = (dict, list, tuple)

Labels = NDArray[np.int64]
Axes = tuple[Labels | None, ...]  # one entry per dimension; None: not channels (batch, height, width, kernel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One convolution or matrix product of the forward pass.

    Its MACs are `factor` times the product of the lengths of its `axes` (the labelled dimensions). `module` is the
    innermost module that made it; `inputs` and `outputs` label the channels that it reads and writes.
    """

    module: str
    kind: str  # "conv" or "matmul"
    groups: int
    factor: int
    axes: tuple[Labels, ...]
    inputs: Labels | None
    outputs: Labels | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What enters and leaves a module the first time it runs: shapes and labels of its first input and output."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: Axes
    out_axes: Axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An activation in memory: `factor` bytes times the product of the lengths of its labelled dimensions."""

    factor: int
    axes: tuple[Labels, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Channels that `module` cuts in parts, at places that it may keep as plain numbers."""

    module: str
    parts: tuple[Labels, ...]


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _NESTED):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, _NESTED):  # most of what a module holds is not: no generator for each
                yield from tensors(item)


class Labelling:
    """The labels of all tensors of one forward pass, and what its operators report.

    Unions are kept in an array of parents, smaller label first, so that FROZEN is always the root of what it touches.
    """

    def __init__(self, named: Mapping[str, Tensor], uncounted: Collection[str] = ()) -> None:
        self._parent = np.zeros(1024, dtype=np.int64)
        self.count = 1  # label 0 is FROZEN
        self._labels: dict[int, tuple[Tensor, Axes]] = {}  # by id; the tensor is held so that its id stays its own
        self._named = dict(named)  # the parameters and buffers
        self._owned = {id(tensor) for tensor in named.values()}
        self.calls: list[Call] = []
        self._uncounted = uncounted  # modules whose products are no MACs
        self.splits: list[Split] = []
        self.unknown: dict[tuple[str, str], None] = {}
        self.flows: dict[str, Flow] = {}
        self.activations = Activations()
        self.norms: dict[str, str] = {}
        self._made: dict[int, str] = {}  # by the id of a tensor, the module whose convolution made it
        self.residual: dict[str, None] = {}
        self._running: list[tuple[str, int]] = [("", 0)]  # the running modules, innermost last, and their inputs' ids

    # labels of tensors

    def get(self, tensor: Tensor) -> Axes:
        """Return the labels of a tensor; a parameter or buffer seen for the first time gets new ones."""
        if id(tensor) not in self._labels:
            # dimensions 0 and 1 are channels: a kernel has height and width, too. Whole numbers, such as the taps of a
            # shift, belong to channels that stay
            is_owned = id(tensor) in self._owned and tensor.is_floating_point()
            sizes = enumerate(tensor.shape)
            self.set(tensor, [self.fresh(n) if is_owned and dim < 2 and n > 1 else None for dim, n in sizes])
        return self._labels[id(tensor)][1]

    def set(self, tensor: Tensor, axes: Sequence[Labels | None]) -> None:
        """Label a tensor, one entry per dimension."""
        self._labels[id(tensor)] = (tensor, tuple(axes))
        self._made.pop(id(tensor), None)  # an in-place operator has changed what the convolution made

    def named_axes(self) -> dict[str, Axes]:
        """Return the labels of the parameters and buffers that were used, by name."""
        return {name: self._labels[id(t)][1] for name, t in self._named.items() if id(t) in self._labels}

    # labels themselves

    def fresh(self, count: int) -> Labels:
        """Make new labels, each a unit of its own."""
        while self.count + count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
        labels = np.arange(self.count, self.count + count)
        self._parent[labels] = labels
        self.count += count
        return labels

    def find(self, labels: Labels) -> Labels:
        """Return the unit that each label belongs to, named by its smallest label."""
        roots = self._parent[labels]
        while not np.array_equal(roots, above := self._parent[roots]):
            roots = above
        self._parent[labels] = roots
        return roots

    def tie(self, a: Labels | None, b: Labels | None) -> None:
        """Make a[i] and b[i] one label. Tied to something that is no channel, labels freeze."""
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
        """Make these channels stay for ever."""
        for labels in axes:
            if labels is not None:
                self.tie(labels, np.full(len(labels), FROZEN))

    # the modules that run

    @property
    def running(self) -> str:
        """The innermost module that runs."""
        return self._running[-1][0]

    def enter(self, module: str, inputs: Any) -> None:
        """Note that `module` starts on `inputs`, its positional arguments."""
        first = next(tensors(inputs), None) if len(inputs) == 1 else None
        self._running.append((module, id(first)))

    def leave(self, module: str, inputs: Any, output: Any) -> None:
        """Note that `module` ends with `output`."""
        self._running.pop()
        self.note(module, inputs, output)

    def note(self, name: str, inputs: Any, output: Any) -> None:
        """Keep the shapes and labels of what went in and out, the first time."""
        first, last = next(tensors(inputs), None), next(tensors(output), None)
        if first is None or last is None or name in self.flows:
            return
        self.flows[name] = Flow(
            in_shape=tuple(first.shape),
            out_shape=tuple(last.shape),
            in_axes=self.get(first),
            out_axes=self.get(last),
        )

    # what the operators report

    def call(self, kind: str, dims: Sequence[tuple[int, Labels | None]], **facts: Any) -> None:
        """Note a product over `dims`, each a length and its labels; a third labelled one is frozen."""
        labelled = [labels for _, labels in dims if labels is not None]
        self.freeze(labelled[2:])
        if self.running in self._uncounted:
            return
        plain = [size for size, labels in dims if labels is None] + [len(labels) for labels in labelled[2:]]
        axes = tuple(labelled[:2])
        self.calls.append(Call(module=self.running, kind=kind, factor=math.prod(plain), axes=axes, **facts))

    def split(self, parts: Sequence[Labels]) -> None:
        """Note that channels are cut in these parts."""
        self.splits.append(Split(module=self.running, parts=tuple(parts)))

    def added(self, inputs: Sequence[Tensor]) -> None:
        """Note that tensors are added: a module whose only input is among them has an identity shortcut."""
        ids = {id(tensor) for tensor in inputs}
        self.residual.update((name, None) for name, entered in self._running if entered in ids)

    def made(self, output: Tensor) -> None:
        """Note that the running module's convolution gives `output`."""
        self._made[id(output)] = self.running

    def normalised(self, image: Tensor) -> None:
        """Note that the running module is a batch norm; `image` may come straight from a convolution."""
        if id(image) in self._made:
            self.norms[self._made[id(image)]] = self.running

    def give_up(self, operator: str, inputs: Sequence[Tensor]) -> None:
        """Freeze the labelled inputs of an operator without a rule; its outputs carry no labels."""
        axes = [labels for tensor in inputs for labels in self.get(tensor)]
        if any((self.find(labels) != FROZEN).any() for labels in axes if labels is not None):
            self.unknown[self.running, operator] = None
        self.freeze(axes)
