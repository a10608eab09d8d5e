"""The costs `flash` and `ram` in closed form: what an int8 file and the arena of its interpreter take.

Of the file: a byte per weight, 16 per channel of a layer (its bias, the scale and zero of its weights), some for each
operator. The arena has two ends. At its head are the activations, a byte each, where TensorFlow Lite Micro's greedy
planner puts them: the largest first, each at the lowest place that is free for as long as it lives. At its tail are the
structures of each operator, and 8 bytes per channel of a layer. What an operator takes was measured, on 64-bit
processors (docs/results/device.md); on those of 32 bits pointers, and so the tail, are smaller.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nas_kd.analysis.device import LAYERS, DeviceGraph, DeviceTensor, Operation, device_graph
from nas_kd.analysis.operator_hook import followed
from nas_kd.analysis.schedule import FLOAT_BYTES
from nas_kd.analysis.structure import Analysis, Site
from nas_kd.analysis.trace import meta_image, without_storage
from nas_kd.costs.cost_terms import Counts, site_cost, site_values
from nas_kd.costs.peak_memory import MemoryTable, base_conv, largest_of, probe
from nas_kd.costs.polynomial import ByChoices, Polynomial, Vector
from nas_kd.errors import ModelError
from nas_kd.genotype import Choice
from nas_kd.networks.convolutions import ConvSpec, build_conv

RULE = "TensorFlow Lite Micro on 64 bits"  # noted by studies that bound flash or ram
_ALIGNED = 16  # bytes to which the interpreter rounds each tensor up
_ROWS = 512  # genotypes that are planned at once
_STEPS = 8  # operators at most in the place of one convolution
_FAR = np.int64(2**60)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bytes:
    """What an operator takes of the arena's tail and of the file, apart from its weights and channels."""

    tail: int
    file: int


_FIXED = _Bytes(tail=768, file=640)  # a little more than was measured: a bound holds
_CHANNEL = _Bytes(tail=8, file=16)
_OPERATORS = {
    "CONV_2D": _Bytes(tail=244, file=268),
    "FULLY_CONNECTED": _Bytes(tail=248, file=232),
    "ADD": _Bytes(tail=160, file=124),
    "MUL": _Bytes(tail=140, file=124),
    "ADD_CONSTANT": _Bytes(tail=186, file=212),
    "MUL_CONSTANT": _Bytes(tail=166, file=212),
    "LOGISTIC": _Bytes(tail=104, file=108),
    "HARD_SWISH": _Bytes(tail=120, file=120),
    "RELU": _Bytes(tail=120, file=108),
    "RELU6": _Bytes(tail=104, file=108),
    "QUANTIZE": _Bytes(tail=120, file=120),
    "MAX_POOL_2D": _Bytes(tail=160, file=142),
    "AVERAGE_POOL_2D": _Bytes(tail=160, file=142),
    "MEAN": _Bytes(tail=187, file=182),
    "PAD": _Bytes(tail=176, file=200),
    "CONCATENATION": _Bytes(tail=176, file=130),
}


def _bytes_of(kind: str) -> _Bytes:
    """What an operator of this kind takes. Raises ModelError for one that no int8 file of ours has."""
    if kind not in _OPERATORS:
        raise ModelError(
            f"the network runs {kind}, which the way to int8 interpreters on devices lacks: its flash and ram are not "
            f"known; operators are {', '.join(_OPERATORS)}; bound size and peak_memory instead"
        )
    return _OPERATORS[kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCost:
    """Bytes of an int8 file, and of the arena in which an interpreter runs it."""

    flash: int
    ram: int


def device_cost(network: nn.Module, input_size: Sequence[int]) -> DeviceCost:
    """Return the closed form of a built network for images of `input_size` (C, H, W)."""
    meta = without_storage(network).eval()
    run = followed(meta, meta_image(meta, input_size))
    activations = run.activations
    graph = device_graph(activations, activations.numbers(run.outputs))

    def length(tensor: DeviceTensor) -> int:
        return activations.made[tensor.number].numel() * tensor.times // tensor.by

    first, last = np.array(graph.lives).T
    sizes = np.array([[length(tensor) for tensor in graph.tensors]])
    tail, file = _FIXED.tail, _FIXED.file
    for operation in graph.operations:
        own = _bytes_of(operation.kind)
        tail, file = tail + own.tail, file + own.file + operation.weights
        if operation.kind in LAYERS:
            channels = activations.made[graph.tensors[operation.makes[0]].number].shape[1]
            tail, file = tail + channels * _CHANNEL.tail, file + channels * _CHANNEL.file
    head = int(planned(sizes, first[None], last[None])[0])
    return DeviceCost(flash=file, ram=head + _up(tail))


def _up(amount: int) -> int:
    return -(-amount // _ALIGNED) * _ALIGNED


def planned(sizes: Vector, first: Vector, last: Vector) -> Vector:
    """Return the bytes that TensorFlow Lite Micro's greedy planner needs (N) for the tensors of N networks: their sizes
    and the first and the last step of their lives (N × tensors). Those of no size are none."""
    sizes = -(-sizes // _ALIGNED) * _ALIGNED
    order = sizes.shape[1] - 1 - np.argsort(-sizes[:, ::-1], axis=1, kind="stable")  # of equal ones the last first
    sizes, first, last = (np.take_along_axis(array, order, axis=1) for array in (sizes, first, last))
    places = np.zeros_like(sizes)
    for column in range(1, int((sizes > 0).sum(axis=1).max(initial=0))):
        own = slice(column, column + 1)
        beside = (first[:, :column] <= last[:, own]) & (last[:, :column] >= first[:, own])
        starts = np.where(beside, places[:, :column], _FAR)
        ends = np.where(beside, places[:, :column] + sizes[:, :column], 0)
        by_start = np.argsort(starts, axis=1, kind="stable")
        starts = np.take_along_axis(starts, by_start, axis=1)
        ends = np.maximum.accumulate(np.take_along_axis(ends, by_start, axis=1), axis=1)
        below = np.concatenate([np.zeros((len(sizes), 1), dtype=np.int64), ends], axis=1)
        above = np.concatenate([starts, np.full((len(sizes), 1), _FAR)], axis=1)
        fits = above - below >= sizes[:, own]
        places[:, column] = np.take_along_axis(below, fits.argmax(axis=1)[:, None], axis=1)[:, 0]
    heads: Vector = np.where(sizes > 0, places + sizes, 0).max(axis=1)
    return heads


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Column:
    """A tensor by the choices of blocks: its size and the steps of its life, later ones by the choice of a block."""

    size: ByChoices
    length: Polynomial[int]  # the same
    first: int
    last: int
    later: tuple[int, Vector] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Drop:
    """A block that may be dropped: what it reads (a column) then lives as long as what it leaves would."""

    block: int
    kept: Vector
    reads: int
    leaves: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceTable:
    """Flash and ram of every genotype of a base; `flash` and `tail` are sums over the choices of blocks. No head is
    smaller than what is alive at once, for which `alive` holds a bound from below, and no tail than `least_tail`."""

    flash: ByChoices
    tail: ByChoices
    columns: tuple[_Column, ...]
    drops: tuple[_Drop, ...]
    alive: MemoryTable

    @property
    def least_tail(self) -> int:
        """A tail that no genotype goes below."""
        return self.tail.bounds()[0]

    def ram(self, indices: Vector) -> Vector:
        """Return the arena (bytes) for each row of N × blocks positions of choices (N)."""
        tail = self.tail.at(indices)
        parts = [self._head(indices[start : start + _ROWS]) for start in range(0, len(indices), _ROWS)]
        heads = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        ram: Vector = heads + -(-tail // _ALIGNED) * _ALIGNED
        return ram

    def _head(self, indices: Vector) -> Vector:
        shape = (len(indices), len(self.columns))
        sizes = np.stack([column.size.at(indices) for column in self.columns], axis=1)
        first = np.broadcast_to([column.first for column in self.columns], shape).astype(np.int64)
        last = np.broadcast_to([column.last for column in self.columns], shape).astype(np.int64)
        for number, column in enumerate(self.columns):
            if column.later is not None:
                block, steps = column.later
                first[:, number] += steps[indices[:, block]]
        for drop in self.drops:
            longer = np.maximum(last[:, drop.reads], last[:, drop.leaves])
            last[:, drop.reads] = np.where(drop.kept[indices[:, drop.block]], last[:, drop.reads], longer)
        return planned(sizes, first, last)


def device_table(analysis: Analysis, counts: Counts) -> DeviceTable:
    """Return the closed form of an analysed base, in the variables of `counts`. Raises ModelError for what no device
    runs."""
    if not analysis.trace.device.operations:  # convnext with torch 2.6
        raise ModelError(
            f"torch {torch.__version__} does not tell how the network gets from its images to its outputs: flash and "
            "ram are not known; update torch, or bound size and peak_memory instead"
        )
    return _Writer(analysis, counts).table()


class _Writer:
    """Writes the operations of a base out by the choices of its blocks."""

    def __init__(self, analysis: Analysis, counts: Counts) -> None:
        self.analysis, self.trace, self.counts = analysis, analysis.trace, counts
        self.graph: DeviceGraph = analysis.trace.device
        self.sites = {site.module: (index, site) for index, block in enumerate(analysis.blocks) for site in block.sites}
        self.spans: dict[str, list[int]] = defaultdict(list)  # the operations of each site
        for number, operation in enumerate(self.graph.operations):
            if operation.module in self.sites:
                self.spans[operation.module].append(number)
        self.columns: list[_Column] = []
        self.place: dict[int, int] = {}  # by tensor: its column
        self.amounts: dict[str, list[Polynomial[int]]] = {"tail": [], "file": []}

    def table(self) -> DeviceTable:
        """Return all of it."""
        lives = self.graph.lives
        self._add_tensor(0, lives)
        for number, operation in enumerate(self.graph.operations):
            if operation.module not in self.sites:
                self._add_operation(operation, lives)
            elif number == self.spans[operation.module][-1]:
                self._add_site(operation.module, lives)
        by_choices = self.counts.variables.by_choices
        return DeviceTable(
            flash=by_choices(Polynomial.sum(self.amounts["file"]) + _FIXED.file),
            tail=by_choices(Polynomial.sum(self.amounts["tail"]) + _FIXED.tail),
            columns=tuple(self.columns),
            drops=tuple(self._drops()),
            alive=self._alive(),
        )

    def _alive(self) -> MemoryTable:
        """What is alive at each step, whatever blocks are dropped."""
        lives = [
            (column.first + (int(column.later[1].max()) if column.later else 0), column.last) for column in self.columns
        ]
        steps = sorted({first for first, _ in lives})
        alive = [frozenset(n for n, (first, last) in enumerate(lives) if first <= step <= last) for step in steps]
        largest = [own for own in dict.fromkeys(alive) if not any(own < other for other in alive)]
        sums = (Polynomial.sum(self.columns[number].length for number in sorted(own)) for own in largest)
        rows = [(None, self.counts.variables.by_choices(row)) for row in sums]
        return largest_of(rows, [len(block.choices) for block in self.analysis.blocks])

    def _add_tensor(self, tensor: int, lives: Sequence[tuple[int, int]], module: str = "") -> None:
        self.place[tensor] = len(self.columns)
        first, last = lives[tensor]
        self._add_column(module, self._length(tensor), _STEPS * first, self._step(last))

    def _add_column(
        self, module: str, length: Polynomial[int], first: int, last: int, later: tuple[int, Vector] | None = None
    ) -> None:
        length = self.counts.kept(module, length)
        size = self.counts.variables.by_choices(length)
        self.columns.append(_Column(size=size, length=length, first=first, last=last, later=later))

    def _step(self, operation: int) -> int:
        """The step at which an operation reads: those in the place of a convolution do at the first of them."""
        span = self.spans.get(self.graph.operations[operation].module, [operation])
        return _STEPS * (span[0] if operation in span else operation)

    def _length(self, tensor: int) -> Polynomial[int]:
        own = self.graph.tensors[tensor]
        stored = self.trace.stored[own.number]
        return self.counts.product(stored.axes) * (stored.factor // FLOAT_BYTES * own.times // own.by)

    def _add_operation(self, operation: Operation, lives: Sequence[tuple[int, int]]) -> None:
        for tensor in operation.makes:
            self._add_tensor(tensor, lives, operation.module)
        own = _bytes_of(operation.kind)
        tail: Polynomial[int] = Polynomial({(): own.tail})
        file: Polynomial[int] = Polynomial({(): own.file})
        if operation.kind in LAYERS:
            channels = self.counts.product(self.trace.stored[self.graph.tensors[operation.makes[0]].number].axes)
            tail, file = tail + _CHANNEL.tail * channels, file + _CHANNEL.file * channels + self._weights(operation)
        self._add_amounts(operation.module, {"tail": tail, "file": file})

    def _weights(self, operation: Operation) -> Polynomial[int]:
        """The weights of a layer, by the widths of what it reads and writes."""
        axes = self.trace.axes.get(f"{operation.module}.weight")
        if axes is None:
            return Polynomial({(): operation.weights} if operation.weights else {})
        labelled = [labels for labels in axes if labels is not None]
        per = max(1, int(np.prod([len(labels) for labels in labelled])))
        return self.counts.product(labelled) * (operation.weights // per)

    def _add_amounts(self, module: str, amounts: Mapping[str, Polynomial[int]]) -> None:
        for name, amount in amounts.items():
            self.amounts[name].append(self.counts.kept(module, amount))

    def _add_site(self, module: str, lives: Sequence[tuple[int, int]]) -> None:
        """Add what runs in the place of a convolution that its block chooses."""
        index, site = self.sites[module]
        block, span = self.analysis.blocks[index], self.spans[module]
        height, width = self.trace.flows[module].in_shape[2:]
        chains = [_chain(*probe(site, choice), (height, width)) for choice in block.choices]
        values = site_values(block, site, self.counts)
        weights = [_weights(site, choice) for choice in block.choices]
        files = [_amount("file", chain) + own for chain, own in zip(chains, weights, strict=True)]
        for name, options in (("tail", [_amount("tail", chain) for chain in chains]), ("file", files)):
            self._add_amounts(module, {name: self.counts.variables.chosen(index, options, values)})
        start, made = _STEPS * span[0], self.graph.operations[span[-1]].makes[0]
        nothing: Polynomial[str] = Polynomial()
        for step in range(max(map(len, chains)) - 1):
            lengths = [chain[step].length if step < len(chain) - 1 else nothing for chain in chains]
            self._add_column(
                module, self.counts.variables.chosen(index, lengths, values), start + step, start + step + 1
            )
        later = np.array([len(chain) - 1 for chain in chains], dtype=np.int64)
        self.place[made] = len(self.columns)
        self._add_column(module, self._length(made), start, self._step(lives[made][1]), (index, later))

    def _drops(self) -> Iterable[_Drop]:
        """The blocks that may be dropped, the last one first."""
        found = []
        for index in self.counts.keeps:
            block = self.analysis.blocks[index]
            inside = [n for n, own in enumerate(self.graph.operations) if f"{own.module}.".startswith(f"{block.name}.")]
            made = {tensor for n in inside for tensor in self.graph.operations[n].makes}
            read = {tensor for n in inside for tensor in self.graph.operations[n].reads} - made
            left = {tensor for tensor in made if self.graph.lives[tensor][1] > inside[-1]}
            if len(read) == len(left) == 1:
                kept = np.array([choice.keep for choice in block.choices])
                drop = _Drop(block=index, kept=kept, reads=self.place[read.pop()], leaves=self.place[left.pop()])
                found.append((inside[-1], drop))
        return [drop for _, drop in sorted(found, key=lambda pair: -pair[0])]


# what runs in the place of one convolution


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    """One operator of a chain: its kind, and its result's length in channels of its inputs or outputs."""

    kind: str
    length: Polynomial[str]
    channels: Polynomial[str]


@functools.lru_cache(maxsize=4096)
def _chain(spec: ConvSpec, is_cheap: bool, size: tuple[int, int]) -> tuple[_Link, ...]:
    """Return the operators that run a convolution on an image of `size` (H, W), each on what the one before makes."""
    with torch.device("meta"):
        module = build_conv(spec) if is_cheap else base_conv(spec)
        run = followed(module, torch.empty(1, spec.in_channels, *size))
    graph = device_graph(run.activations, run.activations.numbers(run.outputs))
    links = []
    for operation in graph.operations:
        tensor = graph.tensors[operation.makes[0]]
        own = run.activations.made[tensor.number]
        name = "inputs" if own.shape[1] == spec.in_channels else "outputs"
        length = own.numel() // own.shape[1] * tensor.times // tensor.by
        links.append(
            _Link(kind=operation.kind, length=Polynomial({(name,): length}), channels=Polynomial({(name,): 1}))
        )
    return tuple(links)


def _amount(name: str, chain: Sequence[_Link]) -> Polynomial[str]:
    """What a chain takes of the `tail` or the `file`, apart from its weights."""
    parts: list[Polynomial[str]] = [Polynomial({(): getattr(_bytes_of(link.kind), name)}) for link in chain]
    parts += [getattr(_CHANNEL, name) * link.channels for link in chain if link.kind in LAYERS]
    return Polynomial.sum(parts)


def _weights(site: Site, choice: Choice) -> Polynomial[str]:
    """The weights of what a choice makes of a convolution; a shift's are zeros and ones."""
    taps = (choice.kernel_size or site.spec.kernel_size) ** 2 if choice.conv == "shift" else 0
    return site_cost(site, choice)[0] + Polynomial({("inputs",): taps} if taps else {})
