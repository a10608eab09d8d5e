"""Which activations are alive at each moment of a forward pass, by one stated schedule: that of a deployed graph.

A *moment* is a call of one ATen operator on activations; they run in torch's order. A tensor is alive from the call
that makes it to the last one that reads it; the network's image and output are alive at the first and last moment. What
an inference runtime fuses makes nothing of its own: a batch norm right behind a convolution, zeros around what a
convolution reads. An elementwise operator, a residual sum too, writes over an input that nothing reads after it, unless
that is the image. Reshaped tensors share the memory of what they view; slices, and tensors whose dimensions change
places, are copies. Weights, what is computed from weights alone, and tensors that nothing reads (the statistics of a
layer norm) do not count. Nothing is counted for what an operator uses inside.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nas_kd.networks.windows import Window, window_of

FLOAT_BYTES = 4  # per element of a floating-point tensor, in whatever precision the network is

_KINDS = {
    name: kind
    for kind, names in {
        "product": "convolution mm bmm addmm baddbmm",
        "norm": "native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training",
        "pad": "constant_pad_nd",
        "reshape": "view _unsafe_view reshape _reshape_alias squeeze unsqueeze expand alias detach",
        "elementwise": "clone contiguous _to_copy where hardswish hardsigmoid hardtanh relu6 leaky_relu prelu"
        " _prelu_kernel",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One call: its module, its operator (ATen's name) and the kind of that, and the numbers of the tensors that it
    reads and makes; of what slides over an image the `window`, of a product the shape of its weights."""

    module: str
    operator: str
    kind: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    window: Window | None = None
    weights: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The moments of a forward pass, the numbers of its outputs, and by tensor that is read the first and the last
    moment of its life."""

    moments: tuple[Moment, ...]
    outputs: tuple[int, ...]
    lives: Mapping[int, tuple[int, int]]


def bytes_of(tensor: Tensor) -> int:
    """The bytes of one element, floating-point ones counted as float32."""
    return FLOAT_BYTES if tensor.is_floating_point() else tensor.element_size()


def bytes_of_weights(network: torch.nn.Module) -> int:
    """The cost `size`: bytes of all parameters and saved buffers as an export's safetensors file holds them, floating
    point at float32 (batch norms also save a count of 8 bytes). The file's header, some 100 bytes a tensor, is not
    counted."""
    saved = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * bytes_of(tensor) for tensor in saved.values())


class Activations:
    """Follows one forward pass: call `record` with each operator. Tensors are numbered as they are made; 0 is the
    image. Reshaped ones have the number of what they view."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []  # held, so that no later tensor gets the address of an earlier one
        self.moments: list[Moment] = []
        self._numbers: dict[Hashable, int] = {}

    def begin(self, image: Tensor) -> None:
        """The forward pass starts on `image`."""
        self._number(image)

    def record(
        self, module: str, operator: Any, arguments: Sequence[Any], inputs: Iterable[Tensor], outputs: Iterable[Tensor]
    ) -> None:
        """`module` calls an ATen operator with `arguments`, of which `inputs` are tensors, and gets `outputs`."""
        reads = self.numbers(inputs)
        if not reads:
            return
        (name, kind), before = _known(operator), len(self.made)
        if kind == "pad" and len(arguments) > 2 and arguments[2] != 0:
            kind = ""
        for tensor in outputs:
            if kind == "reshape":
                self._numbers.setdefault(_place(tensor), reads[0])
            else:
                self._number(tensor)
        makes = tuple(range(before, len(self.made)))
        window = window_of(name, arguments)
        weights = _weights(name, arguments) if kind == "product" and len(reads) == 1 else ()
        self.moments.append(
            Moment(module=module, operator=name, kind=kind, reads=reads, makes=makes, window=window, weights=weights)
        )

    def numbers(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """The numbers of those among `tensors` that are activations."""
        found = (self._numbers.get(_place(tensor)) for tensor in tensors)
        return tuple(dict.fromkeys(number for number in found if number is not None))

    def _number(self, tensor: Tensor) -> None:
        if self._numbers.setdefault(_place(tensor), len(self.made)) == len(self.made):
            self.made.append(tensor)

    def schedule(self, outputs: Iterable[Tensor]) -> Schedule:
        """What was followed, as it is deployed: a tensor that takes another's place has its number."""
        merger = _Merger(self.moments, self.made, self.numbers(outputs))
        moments = tuple(merger.moments())
        numbers = tuple(dict.fromkeys(map(merger.root, self.numbers(outputs))))
        return Schedule(moments=moments, outputs=numbers, lives=_lifetimes(moments, numbers))

    def peak(self, outputs: Iterable[Tensor]) -> int:
        """The cost `peak_memory`: the largest sum of bytes alive at any moment."""
        schedule = self.schedule(outputs)
        totals = [0] * (len(schedule.moments) + 1)
        for number, (first, last) in schedule.lives.items():
            bytes_ = _length(self.made[number])
            totals[first] += bytes_
            totals[last + 1] -= bytes_
        now = highest = 0
        for change in totals:
            now += change
            highest = max(highest, now)
        return highest


class _Merger:
    """Finds which tensors take the place of which."""

    def __init__(self, moments: Sequence[Moment], made: Sequence[Tensor], outputs: Iterable[int]) -> None:
        self._moments, self._made = moments, made
        self._roots: dict[int, int] = {}
        self._last: dict[int, int] = {}  # by number, the last moment that reads it
        self._written: dict[int, str] = {}  # by number, the kind of operator that wrote it last
        self._readers: defaultdict[int, set[str]] = defaultdict(set)
        for index, moment in enumerate(moments):
            self._last.update(dict.fromkeys(moment.reads, index))
            for number in moment.reads:
                self._readers[number].add(moment.kind)
        self._last.update(dict.fromkeys(outputs, len(moments)))

    def root(self, number: int) -> int:
        """The number of the tensor whose place this one takes in the end."""
        return self._roots.get(number, number)

    def moments(self) -> Iterator[Moment]:
        """Yield the moments with the numbers of places."""
        for index, moment in enumerate(self._moments):
            reads = tuple(dict.fromkeys(map(self.root, moment.reads)))
            made, place = moment.makes, self._place(index, moment, reads)
            if place is not None:
                self._roots[made[0]] = place
                self._last[place] = max(self._last[place], self._last.get(made[0], index))
                made = made[1:]
            self._written.update(dict.fromkeys(made or reads[:1], moment.kind))
            yield replace(moment, reads=reads, makes=made)

    def _place(self, index: int, moment: Moment, reads: Sequence[int]) -> int | None:
        """Whose place the first tensor that a moment makes takes; the newest one's, where there are several."""
        if not moment.makes or moment.kind not in ("elementwise", "norm", "pad"):
            return None
        made = moment.makes[0]
        if moment.kind == "pad":
            return reads[0] if self._readers[made] == {"product"} else None
        length = _length(self._made[made])
        free = [n for n in reads if n and self._last[n] == index and _length(self._made[n]) == length]
        if moment.kind == "norm":
            free = [n for n in free[:1] if self._written.get(n) in ("product", "norm")]
        return max(free, default=None)


def _lifetimes(moments: Sequence[Moment], outputs: Iterable[int]) -> dict[int, tuple[int, int]]:
    first: dict[int, int] = {0: 0}
    last: dict[int, int] = {}
    for index, moment in enumerate(moments):
        first.update((number, index) for number in moment.makes)
        last.update((number, index) for number in moment.reads)
    last.update((number, len(moments) - 1) for number in outputs)
    return {number: (first[number], last[number]) for number in sorted(last) if number in first}


def _weights(name: str, arguments: Sequence[Any]) -> tuple[int, ...]:
    """The shape of a product's weights: of a convolution its kernels, else what it multiplies with."""
    weights = arguments[1 if name == "convolution" else -1]
    return tuple(weights.shape) if isinstance(weights, Tensor) else ()


@functools.cache
def _known(operator: Any) -> tuple[str, str]:
    """The name of an ATen operator, without what marks it as in place, and its kind."""
    name = operator._schema.name.removeprefix("aten::")
    kind = _KINDS.get(name) or _KINDS.get(name.removesuffix("_"), "")
    if not kind and torch.Tag.pointwise in operator.tags:
        kind = "elementwise"
    return name.removesuffix("_"), kind


def _length(tensor: Tensor) -> int:
    return tensor.numel() * bytes_of(tensor)


def _place(tensor: Tensor) -> Hashable:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
