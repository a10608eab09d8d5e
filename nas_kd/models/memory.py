"""The cost `peak_memory` in closed form: a maximum over moments of sums of lengths.

At each moment of the forward pass (see `schedule`) some tensors are alive. The length of each is a constant plus a
number per block that narrows it, so what is alive is a sum over blocks, and the peak is the largest of these sums.
Only few moments can be the largest; those that depend on the same blocks become one table. A cheap convolution has
moments of its own, which are read off a run of that very module between few channels. A dropped block has none, and
what it would have made is what it would have read.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import Conv2dSame
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nas_kd.models.convs import ConvSpec, build_conv
from nas_kd.models.labels import Labels, Stored, tensors
from nas_kd.models.schedule import Activations, bytes_of, lifetimes
from nas_kd.models.structure import Analysis, Site, is_replaced, replaced
from nas_kd.models.trace import Trace

Vector = NDArray[np.int64]
Count = Callable[[Labels], tuple[int, Mapping[int, Vector]]]  # channels that stay: a constant, and a number per choice
_DENSE = 2**14  # entries of a table at most; moments that depend on more choices stay sums


@dataclass(slots=True)
class _Amount:
    """A number of bytes: a constant, plus numbers per choice of single blocks, plus products of such numbers."""

    constant: int = 0
    single: dict[int, Vector] = field(default_factory=dict)
    products: list[dict[int, Vector]] = field(default_factory=list)

    def add(self, other: _Amount) -> None:
        self.constant += other.constant
        for block, vector in other.single.items():
            self.single[block] = self.single[block] + vector if block in self.single else vector
        self.products += other.products

    def scaled(self, block: int, vector: Vector) -> _Amount:
        """This amount times a number per choice of `block`."""
        result = _Amount()
        for factors in self.factors():
            own = factors.get(block)
            result.add_product({**factors, block: vector if own is None else own * vector})
        result.add_product({block: vector * self.constant})
        return result

    def times(self, constant: int, single: Mapping[int, Vector]) -> _Amount:
        """This amount times a sum."""
        result = _Amount(constant=self.constant * constant)
        for factors in self.factors():
            block, vector = next(iter(factors.items()))
            result.add_product({**factors, block: vector * constant})
        for block, vector in single.items():
            result.add(self.scaled(block, vector))
        return result

    def factors(self) -> Iterator[dict[int, Vector]]:
        """Every term but the constant, as a product of numbers per choice of single blocks."""
        yield from ({block: vector} for block, vector in self.single.items())
        yield from self.products

    def add_product(self, factors: dict[int, Vector]) -> None:
        if all(vector.any() for vector in factors.values()):
            self.add(_Amount(single=factors) if len(factors) == 1 else _Amount(products=[factors]))

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(sorted({block for factors in self.factors() for block in factors}))

    def bounds(self) -> tuple[int, int]:
        """What this amount is at least and at most; nothing in it is negative."""
        least = most = self.constant
        for factors in self.factors():
            least += math.prod(int(vector.min()) for vector in factors.values())
            most += math.prod(int(vector.max()) for vector in factors.values())
        return least, most

    def at(self, indices: NDArray[np.int64]) -> Vector:
        """This amount for each row of N × blocks positions (N)."""
        total = np.full(len(indices), self.constant, dtype=np.int64)
        for factors in self.factors():
            columns = [vector[indices[:, block]] for block, vector in factors.items()]
            total += functools.reduce(np.multiply, columns)
        return total

    def table(self, lengths: Sequence[int]) -> Vector:
        """This amount for all choices of `blocks`, one dimension each; `lengths` are the numbers of choices."""
        blocks = self.blocks
        table = np.full([lengths[block] for block in blocks], self.constant, dtype=np.int64)
        for factors in self.factors():
            shapes = [(v, [-1 if b == block else 1 for b in blocks]) for block, v in factors.items()]
            table = table + functools.reduce(np.multiply, (vector.reshape(shape) for vector, shape in shapes))
        return table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Moments that depend on the choices of the same blocks: `table` has one dimension per block of `blocks` and holds
    the largest of them. `owner` is the block whose kinds of convolution they depend on, None when on widths alone."""

    owner: int | None
    blocks: tuple[int, ...]
    table: Vector

    def at(self, indices: NDArray[np.int64]) -> Vector:
        """The largest amount for each row of N × blocks positions (N)."""
        values: Vector = self.table[tuple(indices[:, block] for block in self.blocks)]
        return np.broadcast_to(values, len(indices))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryTable:
    """The peak memory of every genotype of a base: the largest of `parts` and of `sums`, moments that depend on too
    many blocks for a table."""

    parts: tuple[Part, ...]
    sums: tuple[tuple[int | None, _Amount], ...]

    def many(self, indices: NDArray[np.int64], owner: int | None = None) -> Vector:
        """The peak (bytes) for each row of N × blocks positions; with `owner` that of its own moments alone."""
        peak = np.zeros(len(indices), dtype=np.int64)
        for part in self.parts:
            if owner is None or part.owner == owner:
                np.maximum(peak, part.at(indices), out=peak)
        for own, amount in self.sums:
            if owner is None or own == owner:
                np.maximum(peak, amount.at(indices), out=peak)
        return peak


def memory_table(analysis: Analysis, count: Count) -> MemoryTable:
    """The closed form of an analysed base. `count` tells how many channels stay of some labels."""
    lengths = [len(block.choices) for block in analysis.blocks]
    rows = list(_Rows(analysis, count).all())
    bounds = [amount.bounds() for _, amount in rows]
    floor = max((least for least, _ in bounds), default=0)
    rows = [row for row, (least, most) in zip(rows, bounds, strict=True) if most > floor or least == floor]
    tables: dict[tuple[int | None, tuple[int, ...]], Vector] = {}
    sums = []
    for owner, amount in rows:
        blocks = amount.blocks
        if math.prod(lengths[block] for block in blocks) > _DENSE:
            sums.append((owner, amount))
            continue
        key = (owner if owner in blocks else None, blocks)
        table = amount.table(lengths)
        tables[key] = np.maximum(tables[key], table) if key in tables else table
    parts = tuple(Part(owner=owner, blocks=blocks, table=table) for (owner, blocks), table in tables.items())
    return MemoryTable(parts=parts, sums=tuple(sums))


def passage(traced: Trace, block: str) -> tuple[int, int | None] | None:
    """The numbers of the one tensor that a block reads and of the one it leaves behind, None for that when it changes
    the first in place. None when there are more."""
    inside = [i for i, moment in enumerate(traced.moments) if _is_inside(moment.module, block)]
    if not inside:
        return None
    made = {number for i in inside for number in traced.moments[i].makes}
    read = {number for i in inside for number in traced.moments[i].reads} - made
    alive = lifetimes(traced.moments, traced.outputs)
    left = {number for number in made if number in alive and alive[number][1] > inside[-1]}
    if len(read) != 1 or len(left) > 1:
        return None
    return read.pop(), next(iter(left), None)


def _is_inside(module: str, block: str) -> bool:
    return module == block or module.startswith(f"{block}.")


class _Rows:
    """What is alive at each moment, as an amount."""

    def __init__(self, analysis: Analysis, count: Count) -> None:
        self.trace, self.blocks, self.count = analysis.trace, analysis.blocks, count
        self._lives = lifetimes(self.trace.moments, self.trace.outputs)
        self._lengths: dict[int, _Amount] = {}
        self._keeps = {
            index: np.array([int(choice.keep) for choice in block.choices])
            for index, block in enumerate(self.blocks)
            if not all(choice.keep for choice in block.choices)
        }
        self._sources: dict[int, tuple[int, int]] = {}  # by what a droppable block leaves: the block, what it reads
        for index in self._keeps:
            through = passage(self.trace, self.blocks[index].name)
            if through is not None and through[1] is not None:
                self._sources[through[1]] = (index, through[0])

    def all(self) -> Iterator[tuple[int | None, _Amount]]:
        """Every amount that can be the largest, with the block that owns it (see `Part`)."""
        sites = {site.module: (index, site) for index, block in enumerate(self.blocks) for site in block.sites}
        spans = _spans([moment.module for moment in self.trace.moments], sites)
        plain: list[tuple[frozenset[int], int | None]] = []
        for position, alive in enumerate(self._alive()):
            module = self.trace.moments[position].module
            around = next((i for i in self._keeps if _is_inside(module, self.blocks[i].name)), None)
            if module not in spans or (rows := self._site_rows(*sites[module], spans[module], alive)) is None:
                _add_if_largest(plain, (alive, around))
            elif position == spans[module][0]:
                yield from ((sites[module][0], self._kept(row, around)) for row in rows)
        for alive, around in plain:
            yield None, self._kept(self._sum(alive), around)

    def _alive(self) -> Iterator[frozenset[int]]:
        """The tensors that are alive at each moment."""
        changes: defaultdict[int, list[int]] = defaultdict(list)
        for number, (first, last) in self._lives.items():
            changes[first].append(number)
            changes[last + 1].append(number)
        alive: frozenset[int] = frozenset()
        for position in range(len(self.trace.moments)):
            alive ^= frozenset(changes[position])
            yield alive

    def _kept(self, amount: _Amount, around: int | None) -> _Amount:
        return amount if around is None else amount.scaled(around, self._keeps[around])

    def _sum(self, alive: frozenset[int]) -> _Amount:
        total = _Amount()
        for number in sorted(alive):
            total.add(self._value(number, alive)[0])
        return total

    def _value(self, number: int, alive: frozenset[int]) -> tuple[_Amount, Stored]:
        """What a tensor adds to those alive; when the block that makes it is dropped, that is what the block reads,
        which adds nothing when it is alive anyway. And the tensor that it is at most."""
        stored, length = self.trace.stored[number], self._length(number)
        if number not in self._sources:
            return length, stored
        block, source = self._sources[number]
        keep = self._keeps[block]
        if source in alive:
            return length.scaled(block, keep), stored
        instead, like = self._value(source, alive)
        if _is_like(like, stored) and not instead.products:
            return length, stored
        total = length.scaled(block, keep)
        total.add(instead.scaled(block, 1 - keep))
        return total, stored

    def _length(self, number: int) -> _Amount:
        if number not in self._lengths:
            stored = self.trace.stored[number]
            amount = _Amount(constant=stored.factor)
            for labels in stored.axes:
                amount = amount.times(*self.count(labels))
            self._lengths[number] = amount
        return self._lengths[number]

    def _site_rows(self, index: int, site: Site, span: tuple[int, int], alive: frozenset[int]) -> list[_Amount] | None:
        """What is alive while the convolution at `site` runs, for whatever its block makes of it; None where it does
        not simply read one tensor and make another."""
        moments = self.trace.moments[span[0] : span[1] + 1]
        made = {number for moment in moments for number in moment.makes}
        read = {number for moment in moments for number in moment.reads} - made
        left = [number for number in made if number in self._lives and self._lives[number][1] > span[1]]
        if len(read) != 1 or len(left) > 1:
            return None
        image = read.pop()
        others, stays = self._sum(alive - made - {image}), self._lives[image][1] > span[1]
        flow = self.trace.flows[site.module]
        batch, _, *size = flow.in_shape
        steps = [_steps(*_probe(site, choice), (batch, *size)) for choice in self.blocks[index].choices]
        rows = []
        for step in itertools.zip_longest(*steps, fillvalue=(0, 0, 0)):
            holds, inputs, outputs = (np.array(column) for column in zip(*step, strict=True))
            row = _Amount()
            row.add(others)
            value = self._value(image, alive)[0]
            row.add(value if stays or holds.all() else value.scaled(index, holds))
            for labels, bytes_each in ((site.inputs, inputs), (site.outputs, outputs)):
                row.add(_Amount(constant=1).times(*self.count(labels)).scaled(index, bytes_each))
            rows.append(row)
        return rows


def _spans(modules: Sequence[str], sites: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    """The first and last moment of each site."""
    spans: dict[str, tuple[int, int]] = {}
    for position, module in enumerate(modules):
        if module in sites:
            spans[module] = (spans.get(module, (position, 0))[0], position)
    return spans


def _add_if_largest(rows: list[tuple[frozenset[int], int | None]], row: tuple[frozenset[int], int | None]) -> None:
    """Adds a moment unless the one before holds as much; takes that one's place when it holds more."""
    if rows and rows[-1][1] == row[1]:
        if row[0] <= rows[-1][0]:
            return
        if rows[-1][0] <= row[0]:
            rows.pop()
    rows.append(row)


def _is_like(one: Stored, other: Stored) -> bool:
    return (
        one.factor == other.factor
        and len(one.axes) == len(other.axes)
        and all(np.array_equal(a, b) for a, b in zip(one.axes, other.axes, strict=True))
    )


# the moments of one convolution

_INPUTS, _OUTPUTS = 8, 12  # channels of a trial run: enough for four groups, and told apart in its tensors


def _probe(site: Site, choice: Any) -> tuple[ConvSpec, bool]:
    """The convolution that `choice` makes of `site`, between few channels, and whether it is a cheap one."""
    outputs = _INPUTS if site.spec.channelwise else _OUTPUTS
    return replaced(site, choice, _INPUTS, outputs), is_replaced(site, choice)


@functools.lru_cache(maxsize=4096)
def _steps(spec: ConvSpec, is_cheap: bool, size: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """For each moment of a convolution that runs on `size` (N, H, W): whether its input is alive (0 or 1), and what
    else is, as bytes per input channel and bytes per output channel. Moments that hold less than another are left out.
    """
    with torch.device("meta"), torch.no_grad():
        module = build_conv(spec) if is_cheap else _plain(spec)
        image = torch.empty(size[0], spec.in_channels, *size[1:])
        follow = _Follow()
        follow.activations.begin(image)
        with follow:
            output = module(image)
    activations = follow.activations
    alive = lifetimes(activations.moments, activations.numbers([output]))
    moments = [[n for n, (first, last) in alive.items() if first <= i <= last] for i in range(len(activations.moments))]
    return tuple(_largest([_step(numbers, activations, spec.in_channels) for numbers in moments]))


def _step(numbers: Iterable[int], activations: Activations, inputs: int) -> tuple[int, int, int]:
    per_input = per_output = holds = 0
    for number in numbers:
        tensor = activations.made[number]
        channels = tensor.shape[1]
        if number == 0:
            holds = 1
        elif channels == inputs:
            per_input += tensor.numel() // channels * bytes_of(tensor)
        else:
            per_output += tensor.numel() // channels * bytes_of(tensor)
    return holds, per_input, per_output


def _largest(steps: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    different = list(dict.fromkeys(steps))
    return [
        step
        for step in different
        if not any(step != other and all(a <= b for a, b in zip(step, other, strict=True)) for other in different)
    ]


def _plain(spec: ConvSpec) -> nn.Module:
    """The base's own kind of convolution."""
    groups = spec.in_channels if spec.channelwise else 1
    kind, padding = (Conv2dSame, 0) if spec.padding == "same" else (nn.Conv2d, int(spec.padding))
    conv: nn.Module = kind(
        spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, padding, spec.dilation, groups
    )
    return conv


class _Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the activations of one module."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.activations = Activations()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.activations.record("", tensors([*args, kwargs or {}]), tensors(output))
        return output
