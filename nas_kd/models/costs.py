"""Exact costs in closed form, from tables made once per base.

The number of channels that a tensor keeps is a constant plus one number per block that narrows it, so the product of
two such numbers, a convolution's weights, is a sum over blocks and over pairs of blocks. One table per block and one
per pair where the width of one is an input width of another give the cost of any genotype by looking up and adding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nas_kd.budget import COUNTED, LATENCY, Cost
from nas_kd.genotype import Choice, Genotype
from nas_kd.models.convs import ConvCost, conv_cost
from nas_kd.models.labels import Labels
from nas_kd.models.memory import MemoryTable, memory_table
from nas_kd.models.schedule import FLOAT_BYTES, bytes_of
from nas_kd.models.structure import Analysis, Block, Site, Widths, is_replaced

Vector = NDArray[np.float64]
SUMS = ("params", "macs", "size")  # the counted costs that are sums; `peak_memory` is a maximum
_ORDER_BYTES = 8  # a shift saves for each channel which one it is


@dataclass(slots=True)
class _Sum:
    """A constant, a vector over the choices of each block, and a matrix over the choices of pairs of blocks."""

    constant: float = 0.0
    single: dict[int, Vector] = field(default_factory=dict)
    pairs: dict[tuple[int, int], Vector] = field(default_factory=dict)

    def add(self, other: _Sum) -> None:
        self.constant += other.constant
        for block, vector in other.single.items():
            self.single[block] = self.single.get(block, 0.0) + vector
        for pair, matrix in other.pairs.items():
            self.pairs[pair] = self.pairs.get(pair, 0.0) + matrix

    def times(self, other: _Sum) -> _Sum:
        """The product of two sums; never of a pair with a third block (see `blocks._changeable`)."""
        product = _Sum(constant=self.constant * other.constant)
        for a, b in ((self, other), (other, self)):
            for block, vector in a.single.items():
                product.add(_Sum(single={block: vector * b.constant}))
            for pair, matrix in a.pairs.items():
                product.add(_Sum(pairs={pair: matrix * b.constant}))
                for block, vector in b.single.items():
                    along = vector[:, None] if block == pair[0] else vector[None, :]
                    assert block in pair
                    product.add(_Sum(pairs={pair: matrix * along}))
        for one, vector in self.single.items():
            for two, other_vector in other.single.items():
                product.add(_outer(one, vector, two, other_vector))
        return product


def _outer(one: int, vector: Vector, two: int, other: Vector) -> _Sum:
    if one == two:
        return _Sum(single={one: vector * other})
    if one < two:
        return _Sum(pairs={(one, two): np.outer(vector, other)})
    return _Sum(pairs={(two, one): np.outer(other, vector)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CostTable:
    """Costs of every genotype of a base: per kind of sum a constant, a vector per block, and a matrix per pair of
    blocks; and `memory`, the moments whose largest is the peak. Latency is a sum too, where it was measured.

    Vectors and matrices are indexed by the position of a choice in `block.choices`.
    """

    blocks: tuple[Block, ...]
    constants: Mapping[str, int]
    single: Mapping[str, tuple[NDArray[np.int64], ...]]
    pairs: Mapping[str, Mapping[tuple[int, int], NDArray[np.int64]]]
    memory: MemoryTable

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of cost that this table tells."""
        return (*COUNTED, LATENCY) if LATENCY in self.single else COUNTED

    def with_latency(self, constant: int, single: Sequence[NDArray[np.int64]]) -> CostTable:
        """This table with a latency (nanoseconds): a constant plus a number per choice of each block."""
        return replace(
            self,
            constants={**self.constants, LATENCY: constant},
            single={**self.single, LATENCY: tuple(single)},
            pairs={**self.pairs, LATENCY: {}},
        )

    def indices(self, genotype: Mapping[str, Choice]) -> NDArray[np.int64]:
        """The position of each block's choice: one row for `many`."""
        return np.array([block.choices.index(genotype[block.name]) for block in self.blocks], dtype=np.int64)

    def genotype(self, indices: Sequence[int] | NDArray[np.int64]) -> Genotype:
        """The genotype of a row of positions; the inverse of `indices`."""
        chosen = zip(self.blocks, indices, strict=True)
        return Genotype.of({block.name: block.choices[index] for block, index in chosen})

    def cost(self, genotype: Mapping[str, Choice]) -> Cost:
        """The cost of one genotype, equal to the unit to what the built student counts; a latency is expected."""
        totals = self.many(self.indices(genotype)[None])
        return Cost(**{kind: int(total[0]) for kind, total in totals.items()})

    def many(self, indices: NDArray[np.int64], kinds: Iterable[str] | None = None) -> dict[str, NDArray[np.int64]]:
        """The costs of N genotypes, given as N × blocks positions: per kind, by default all, an array of N."""
        return {kind: self._total(kind, indices) for kind in (self.kinds if kinds is None else kinds)}

    def priced(self, indices: NDArray[np.int64], kinds: Sequence[str]) -> Vector:
        """The costs of N genotypes (N × blocks positions) as N × kinds."""
        totals = self.many(indices, kinds)
        return np.stack([totals[kind] for kind in kinds], axis=1).astype(np.float64)

    def _total(self, kind: str, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        if not is_sum(kind):
            return self.memory.many(indices)
        total = np.full(len(indices), self.constants[kind], dtype=np.int64)
        for column, vector in enumerate(self.single[kind]):
            total += vector[indices[:, column]]
        for (one, two), matrix in self.pairs[kind].items():
            total += matrix[indices[:, one], indices[:, two]]
        return np.maximum(total, 1) if kind == LATENCY else total  # a sum of differences may be none

    def base(self) -> Cost:
        """The cost of the base itself."""
        return self.cost({block.name: block.default for block in self.blocks})

    def cheapest(self, kind: str) -> Genotype:
        """The genotype of the smallest reachable cost of this kind.

        Every cost grows with every width, and at given widths each block's kernel and kind count for themselves, so
        the narrowest choice of each block that is cheapest beside the narrowest others is the cheapest of all. Of a
        peak the moments in which a block's own kinds run count alone: others may hide them. A latency is a sum over
        blocks, each of which counts for itself.
        """
        if kind == LATENCY:
            return self.genotype([int(vector.argmin()) for vector in self.single[kind]])
        narrowest = [min(range(len(b.choices)), key=lambda i, b=b: b.choices[i].width) for b in self.blocks]  # type: ignore[misc]
        chosen = list(narrowest)
        for column, block in enumerate(self.blocks):
            rows = np.tile(np.array(narrowest), (len(block.choices), 1))
            rows[:, column] = np.arange(len(block.choices))
            totals = self._total(kind, rows) if is_sum(kind) else self._own_peak(column, rows)
            chosen[column] = int(totals.argmin())
        return self.genotype(chosen)

    def _own_peak(self, column: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The peak of a block's own moments for each of its choices; wider ones than the narrowest are out."""
        choices = self.blocks[column].choices
        least = min(choice.width for choice in choices)
        totals = self.memory.many(rows, owner=column)
        wide = np.array([choice.width > least and choice.keep for choice in choices])
        return np.where(wide, np.iinfo(np.int64).max, totals)


def is_sum(kind: str) -> bool:
    """Whether a kind of cost is a sum over blocks and pairs of blocks."""
    return kind != "peak_memory"


def cost_table(analysis: Analysis, network: nn.Module) -> CostTable:
    """The cost tables of an analysed base. Takes a fraction of a second; building no student."""
    builder = _Builder(analysis)
    totals = {kind: _Sum() for kind in SUMS}
    sites = {site.module: (index, site) for index, block in enumerate(analysis.blocks) for site in block.sites}
    for index, site in sites.values():
        params, macs = builder.site(index, site)
        totals["params"].add(builder.kept(site.module, params))
        totals["macs"].add(builder.kept(site.module, macs))
        totals["size"].add(builder.kept(site.module, builder.orders(index, site)))
    for name, parameter in network.named_parameters():
        module, _, tensor = name.rpartition(".")
        axes = analysis.trace.axes.get(name, (None,) * parameter.ndim)
        size = builder.product(axes, parameter.shape)
        if module in sites and tensor == "weight":
            continue
        if module in sites and tensor != "bias":  # the gain of a weight-standardised convolution goes with it
            size = size.times(builder.stays(*sites[module]))
        totals["params"].add(builder.kept(name, size))
    for call in analysis.trace.calls:
        if call.module not in sites:
            macs = builder.product((*call.axes, None), (*map(len, call.axes), call.factor))
            totals["macs"].add(builder.kept(call.module, macs))
    totals["size"].add(totals["params"].times(_Sum(constant=FLOAT_BYTES)))
    saved = network.state_dict().keys()
    for name, buffer in network.named_buffers():
        if name in saved:
            axes = analysis.trace.axes.get(name, (None,) * buffer.ndim)
            amount = builder.product(axes, buffer.shape).times(_Sum(constant=bytes_of(buffer)))
            totals["size"].add(builder.kept(name, amount))
    return builder.table(totals, memory_table(analysis, builder.whole_count))


class _Builder:
    """Turns labelled dimensions into sums over the choices of blocks; remembers what it has counted."""

    def __init__(self, analysis: Analysis) -> None:
        self.blocks = analysis.blocks
        self._index = {block.name: index for index, block in enumerate(self.blocks)}
        self._widths = Widths({block.name: block.channels for block in self.blocks}, analysis.trace.labels)
        self._counted: dict[bytes, _Sum] = {}
        self._droppable = [(f"{b.name}.", i) for i, b in enumerate(self.blocks) if not all(c.keep for c in b.choices)]

    def kept(self, path: str, amount: _Sum) -> _Sum:
        """`amount` where the block around `path` is not dropped, else nothing."""
        for prefix, index in self._droppable:
            if path.startswith(prefix):
                keeps = np.array([float(choice.keep) for choice in self.blocks[index].choices])
                return amount.times(_Sum(single={index: keeps}))
        return amount

    def stays(self, index: int, site: Site) -> _Sum:
        """1 where the convolution at `site` is the base's own, 0 where another kind takes its place."""
        own = [float(not is_replaced(site, choice)) for choice in self.blocks[index].choices]
        return _Sum(single={index: np.array(own)})

    def count(self, labels: Labels) -> _Sum:
        """How many channels of a dimension stay, as a constant and a number per choice."""
        key = labels.tobytes()
        if key not in self._counted:
            self._counted[key] = self._count(labels)
        return self._counted[key]

    def _count(self, labels: Labels) -> _Sum:
        result = _Sum(constant=float(len(labels)))
        for name, count in self._widths.setters(labels).items():
            block = self.blocks[index := self._index[name]]
            by_width = {width: self._widths.kept(labels, name, width) for width in block.widths}
            result.constant -= count
            result.single[index] = np.array([by_width[choice.width] for choice in block.choices], dtype=np.float64)
        return result

    def whole_count(self, labels: Labels) -> tuple[int, dict[int, NDArray[np.int64]]]:
        """`count` in whole numbers: the constant, and a vector per block."""
        result = self.count(labels)
        return round(result.constant), {index: np.rint(v).astype(np.int64) for index, v in result.single.items()}

    def orders(self, index: int, site: Site) -> _Sum:
        """The bytes in which shifts at `site` save the order of their channels."""
        choices = self.blocks[index].choices
        bytes_each = [_ORDER_BYTES if is_replaced(site, c) and _kind(site, c) == "shift" else 0 for c in choices]
        return self._weigh(index, site, [ConvCost(inputs=number) for number in bytes_each])

    def product(self, axes: Sequence[Labels | None], lengths: Sequence[int]) -> _Sum:
        """The number of entries of a tensor with these dimensions."""
        result = _Sum(constant=math.prod(n for axis, n in zip(axes, lengths, strict=True) if axis is None))
        for axis in axes:
            if axis is not None:
                result = result.times(self.count(axis))
        return result

    def site(self, index: int, site: Site) -> tuple[_Sum, _Sum]:
        """Params (bias apart) and MACs of a convolution whose kernel and kind its block chooses."""
        choices = self.blocks[index].choices
        costs = [
            conv_cost(
                _kind(site, choice),
                choice.kernel_size or site.spec.kernel_size,
                site.positions,
                channelwise=site.spec.channelwise,
            )
            for choice in choices
        ]
        params, macs = zip(*costs, strict=True)
        return self._weigh(index, site, params), self._weigh(index, site, macs)

    def _weigh(self, index: int, site: Site, costs: Sequence[ConvCost]) -> _Sum:
        inputs, outputs = self.count(site.inputs), self.count(site.outputs)
        total = _Sum()
        for name, counts in _monomials(inputs, outputs):
            factors = np.array([getattr(cost, name) for cost in costs], dtype=np.float64)
            if factors.any():
                total.add(counts().times(_Sum(single={index: factors})))
        return total

    def table(self, totals: Mapping[str, _Sum], memory: MemoryTable) -> CostTable:
        def whole(vector: Vector) -> NDArray[np.int64]:
            return np.rint(vector).astype(np.int64)

        empty = [np.zeros(len(block.choices)) for block in self.blocks]
        single = {
            kind: tuple(whole(total.single.get(index, zeros)) for index, zeros in enumerate(empty))
            for kind, total in totals.items()
        }
        return CostTable(
            blocks=self.blocks,
            constants={kind: round(total.constant) for kind, total in totals.items()},
            single=single,
            pairs={kind: {pair: whole(m) for pair, m in total.pairs.items()} for kind, total in totals.items()},
            memory=memory,
        )


def _kind(site: Site, choice: Choice) -> str:
    if site.spec.channelwise:
        return "shift" if choice.conv == "shift" else "depthwise"
    return choice.conv or "standard"


def _monomials(inputs: _Sum, outputs: _Sum) -> Iterator[tuple[str, Callable[[], _Sum]]]:
    """The products of channels that `ConvCost` has a factor for, made only where it is not zero."""
    yield "both", lambda: inputs.times(outputs)
    yield "square", lambda: inputs.times(inputs)
    yield "inputs", lambda: inputs
    yield "outputs", lambda: outputs
