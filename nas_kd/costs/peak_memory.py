"""The cost `peak_memory` in closed form: a maximum over moments of sums of lengths.

At each moment of the forward pass (see `schedule`) some tensors are alive. The length of each is a polynomial of what
blocks keep (see `cost_terms`), so is what is alive, and the peak is the largest of these.
Only few moments can be the largest; those that depend on the same blocks become one table. A cheap convolution has
moments of its own, which are read off a run of that very module between few channels. A dropped block has none, and
what it would have made is what it would have read.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.layers import Conv2dSame
from torch import nn

from nas_kd.analysis.operator_hook import followed
from nas_kd.analysis.schedule import Activations, bytes_of
from nas_kd.analysis.structure import Analysis, Site, is_replaced, replaced
from nas_kd.analysis.trace import ends_of_block
from nas_kd.costs.cost_terms import Counts
from nas_kd.costs.polynomial import ByChoices, Polynomial, Vector
from nas_kd.networks.convolutions import ConvSpec, build_conv

RULE = "as deployed (earlier versions counted otherwise)"  # noted by studies that bound it
_DENSE = 2**14  # entries of a table at most; moments that depend on more choices stay sums


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MomentTable:
    """Moments that depend on the choices of the same blocks: `table` has one dimension per block of `blocks` and holds
    the largest of them. `owner` is the block whose kinds of convolution they depend on, None when on widths alone."""

    owner: int | None
    blocks: tuple[int, ...]
    table: Vector

    def at(self, indices: Vector) -> Vector:
        """Return the largest amount for each row of N × blocks positions (N)."""
        values: Vector = self.table[tuple(indices[:, block] for block in self.blocks)]
        return np.broadcast_to(values, len(indices))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryTable:
    """The peak memory of every genotype of a base: the largest of `parts` and of `sums`, moments that depend on too
    many blocks for a table."""

    parts: tuple[MomentTable, ...]
    sums: tuple[tuple[int | None, ByChoices], ...]

    def many(self, indices: Vector, owner: int | None = None) -> Vector:
        """Return the peak (bytes) for each row of N × blocks positions; with `owner` that of its own moments alone."""
        peak = np.zeros(len(indices), dtype=np.int64)
        for part in self.parts:
            if owner is None or part.owner == owner:
                np.maximum(peak, part.at(indices), out=peak)
        for own, amount in self.sums:
            if owner is None or own == owner:
                np.maximum(peak, amount.at(indices), out=peak)
        return peak


def memory_table(analysis: Analysis, counts: Counts) -> MemoryTable:
    """Return the closed form of an analysed base, in the variables of `counts`."""
    rows = [(owner, counts.variables.by_choices(row)) for owner, row in _Rows(analysis, counts).all()]
    return largest_of(rows, [len(block.choices) for block in analysis.blocks])


def largest_of(rows: Sequence[tuple[int | None, ByChoices]], lengths: Sequence[int]) -> MemoryTable:
    """Return the largest of sums, each with the block that owns it (`MomentTable`); blocks have `lengths` choices."""
    bounds = [row.bounds() for _, row in rows]
    floor = max((least for least, _ in bounds), default=0)
    tables: dict[tuple[int | None, tuple[int, ...]], Vector] = {}
    sums = []
    for (owner, row), (least, most) in zip(rows, bounds, strict=True):
        blocks = row.blocks
        if most <= floor != least:
            continue  # another moment holds as much, whatever is chosen
        if math.prod(lengths[block] for block in blocks) > _DENSE:
            sums.append((owner, row))
            continue
        key = (owner if owner in blocks else None, blocks)
        table = row.table(blocks, lengths)
        tables[key] = np.maximum(tables[key], table) if key in tables else table
    parts = tuple(MomentTable(owner=owner, blocks=blocks, table=table) for (owner, blocks), table in tables.items())
    return MemoryTable(parts=parts, sums=tuple(sums))


class _Rows:
    """What is alive at each moment, as a polynomial."""

    def __init__(self, analysis: Analysis, counts: Counts) -> None:
        self.trace, self.blocks, self.counts = analysis.trace, analysis.blocks, counts
        self._sources: dict[int, tuple[int, int]] = {}  # by what a droppable block leaves: the block, what it reads
        for index in counts.keeps:
            through = ends_of_block(self.trace, self.blocks[index].name)
            if through is not None and through[1] is not None:
                self._sources[through[1]] = (index, through[0])

    def all(self) -> Iterator[tuple[int | None, Polynomial[int]]]:
        """Yield every sum that can be the largest, with the block that owns it (see `MomentTable`)."""
        sites = {site.module: (index, site) for index, block in enumerate(self.blocks) for site in block.sites}
        spans: dict[str, tuple[int, int]] = {}  # the first and last moment of each site
        for position, moment in enumerate(self.trace.moments):
            if moment.module in sites:
                spans[moment.module] = (spans.get(moment.module, (position, 0))[0], position)
        plain: list[tuple[frozenset[int], str]] = []
        for position, alive in enumerate(self._alive()):
            module = self.trace.moments[position].module
            if module not in spans or (rows := self._site_rows(*sites[module], spans[module], alive)) is None:
                self._add_if_largest(plain, (alive, module))
            elif position == spans[module][0]:
                yield from ((sites[module][0], self.counts.kept(module, row)) for row in rows)
        for alive, module in plain:
            yield None, self.counts.kept(module, self._sum(alive))

    def _add_if_largest(self, rows: list[tuple[frozenset[int], str]], row: tuple[frozenset[int], str]) -> None:
        """Add a moment unless the one before holds as much; it takes that one's place when it holds more."""
        if rows and self.counts.around(rows[-1][1]) == self.counts.around(row[1]):
            if row[0] <= rows[-1][0]:
                return
            if rows[-1][0] <= row[0]:
                rows.pop()
        rows.append(row)

    def _alive(self) -> Iterator[frozenset[int]]:
        """Yield the tensors that are alive at each moment."""
        changes: defaultdict[int, set[int]] = defaultdict(set)
        for number, (first, last) in self.trace.lives.items():
            changes[first].add(number)
            changes[last + 1].add(number)
        alive: frozenset[int] = frozenset()
        for position in range(len(self.trace.moments)):
            alive ^= changes[position]
            yield alive

    def _sum(self, alive: frozenset[int]) -> Polynomial[int]:
        return Polynomial.sum(self._bytes(number, alive) for number in sorted(alive))

    def _bytes(self, number: int, alive: frozenset[int]) -> Polynomial[int]:
        """Return what a tensor adds to those alive; when the block that makes it is dropped, that is what the block
        reads, which adds nothing when it is alive anyway."""
        stored = self.trace.stored[number]
        length = stored.factor * self.counts.product(stored.axes)
        if number not in self._sources:
            return length
        block, source = self._sources[number]
        made = self.counts.keeps[block] * length
        if source in alive:
            return made
        instead = self._bytes(source, alive)
        return length if instead == length else made + self.counts.drops[block] * instead

    def _site_rows(
        self, index: int, site: Site, span: tuple[int, int], alive: frozenset[int]
    ) -> list[Polynomial[int]] | None:
        """Return what is alive while the convolution at `site` runs, for whatever its block makes of it; None where it
        does not simply read one tensor and make another."""
        through = ends_of_block(self.trace, site.module)
        if through is None:
            return None
        image, made = through[0], {n for moment in self.trace.moments[span[0] : span[1] + 1] for n in moment.makes}
        others, value = self._sum(alive - made - {image}), self._bytes(image, alive)
        if self.trace.lives[image][1] > span[1]:
            others, value = others + value, Polynomial()
        values = {"image": value, **{n: self.counts.count(getattr(site, n)) for n in ("inputs", "outputs")}}
        batch, _, *size = self.trace.flows[site.module].in_shape
        choices = self.blocks[index].choices
        kinds = {(choice.kernel_size, choice.conv): choice for choice in choices}
        steps = {kind: _steps(*probe(site, choice), (batch, *size)) for kind, choice in kinds.items()}
        nothing: Polynomial[str] = Polynomial()
        of_choices = itertools.zip_longest(*(steps[c.kernel_size, c.conv] for c in choices), fillvalue=nothing)
        return [others + self.counts.variables.chosen(index, options, values) for options in of_choices]


# the moments of one convolution

_NAMES = ("image", "inputs", "outputs")
_INPUTS, _OUTPUTS = 8, 12  # channels of a trial run: enough for four groups, and told apart in its tensors


def probe(site: Site, choice: Any) -> tuple[ConvSpec, bool]:
    """Return the convolution that `choice` makes of `site`, between few channels, and whether it is a cheap one."""
    outputs = _INPUTS if site.spec.channelwise else _OUTPUTS
    return replaced(site, choice, _INPUTS, outputs), is_replaced(site, choice)


@functools.lru_cache(maxsize=4096)
def _steps(spec: ConvSpec, is_cheap: bool, size: tuple[int, ...]) -> tuple[Polynomial[str], ...]:
    """Return the bytes that are alive at each moment of a convolution that runs on `size` (N, H, W): `image`, its
    input where that is alive, and so many per channel of its `inputs` and `outputs`. Moments that hold less than
    another are left out."""
    with torch.device("meta"):
        module = build_conv(spec) if is_cheap else base_conv(spec)
        run = followed(module, torch.empty(size[0], spec.in_channels, *size[1:]))
    schedule = run.activations.schedule(run.outputs)
    alive = [
        [n for n, (first, last) in schedule.lives.items() if first <= i <= last] for i in range(len(schedule.moments))
    ]
    steps = _largest([_step(numbers, run.activations, spec.in_channels) for numbers in alive])
    return tuple(Polynomial({(name,): n for name, n in zip(_NAMES, step, strict=True) if n}) for step in steps)


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


def base_conv(spec: ConvSpec) -> nn.Module:
    """Build the base's own kind of convolution."""
    groups = spec.in_channels if spec.channelwise else 1
    kind, padding = (Conv2dSame, 0) if spec.padding == "same" else (nn.Conv2d, int(spec.padding))
    conv: nn.Module = kind(
        spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, padding, spec.dilation, groups
    )
    return conv
