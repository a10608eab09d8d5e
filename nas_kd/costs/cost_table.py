"""Exact costs in closed form, from tables made once per base.

The polynomials of `cost_terms` multiply the choices of two blocks at most. One table per block and one per pair where
the width of one is an input width of another give the cost of any genotype by looking up and adding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nas_kd.analysis.structure import Analysis, Block, genotype_of, row_of
from nas_kd.budget import COUNTED, DEVICE, MEASURED, Cost
from nas_kd.costs.cost_terms import Counts, cost_polynomials
from nas_kd.costs.device import DeviceTable, device_table
from nas_kd.costs.peak_memory import MemoryTable, memory_table
from nas_kd.costs.polynomial import ByChoices, Vector
from nas_kd.genotype import Choice, Genotype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CostTable:
    """Costs of every genotype of a base: per kind of sum a constant, a vector per block, and a matrix per pair of
    blocks; and `memory`, the moments whose largest is the peak. Latency and cycles are sums too,
    where they were measured. `device` tells flash and ram, where these are asked for.

    Vectors and matrices are indexed by the position of a choice in `block.choices`.
    """

    blocks: tuple[Block, ...]
    constants: Mapping[str, int]
    single: Mapping[str, tuple[Vector, ...]]
    pairs: Mapping[str, Mapping[tuple[int, int], Vector]]
    memory: MemoryTable
    device: DeviceTable | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of cost that this table tells."""
        return (*COUNTED, *(DEVICE if self.device else ()), *(kind for kind in MEASURED if kind in self.single))

    def with_device(self, device: DeviceTable) -> CostTable:
        """Add flash and ram to this table."""
        sums = _tables({"flash": device.flash}, self.blocks)
        return replace(
            self,
            device=device,
            constants={**self.constants, **sums["constants"]},
            single={**self.single, **sums["single"]},
            pairs={**self.pairs, **sums["pairs"]},
        )

    def with_measured(self, kind: str, terms: Mapping[tuple[int, ...], NDArray[np.float64]]) -> CostTable:
        """Add a kind of cost that is measured (nanoseconds, cycles) to this table: sums over no blocks, one, or two."""
        whole = {blocks: np.rint(numbers).astype(np.int64) for blocks, numbers in terms.items()}
        nothing = [np.zeros(len(block.choices), dtype=np.int64) for block in self.blocks]
        pairs = {(blocks[0], blocks[1]): matrix for blocks, matrix in whole.items() if len(blocks) == 2}
        return replace(
            self,
            constants={**self.constants, kind: int(whole.get((), np.int64(0)))},
            single={**self.single, kind: tuple(whole.get((index,), zeros) for index, zeros in enumerate(nothing))},
            pairs={**self.pairs, kind: pairs},
        )

    def indices(self, genotype: Mapping[str, Choice]) -> Vector:
        """Return the position of each block's choice: one row for `many`."""
        return row_of(self.blocks, genotype)

    def genotype(self, indices: Sequence[int] | Vector) -> Genotype:
        """Return the genotype of a row of positions; the inverse of `indices`."""
        return genotype_of(self.blocks, indices)

    def cost(self, genotype: Mapping[str, Choice]) -> Cost:
        """Return the cost of one genotype, equal to what the built student counts; what is measured is expected."""
        totals = self.many(self.indices(genotype)[None])
        return Cost(**{kind: int(total[0]) for kind, total in totals.items()})

    def many(self, indices: Vector, kinds: Iterable[str] | None = None) -> dict[str, Vector]:
        """Return the costs of N genotypes, given as N × blocks positions: per kind, by default all, an array of N."""
        return {kind: self._total(kind, indices) for kind in (self.kinds if kinds is None else kinds)}

    def priced(self, indices: Vector, kinds: Sequence[str]) -> NDArray[np.float64]:
        """Return the costs of N genotypes (N × blocks positions) as N × kinds."""
        totals = self.many(indices, kinds)
        return np.stack([totals[kind] for kind in kinds], axis=1).astype(np.float64)

    def _total(self, kind: str, indices: Vector) -> Vector:
        if kind == "ram":
            assert self.device is not None
            return self.device.ram(indices)
        if not is_sum(kind):
            return self.memory.many(indices)
        total = np.full(len(indices), self.constants[kind], dtype=np.int64)
        for column, vector in enumerate(self.single[kind]):
            total += vector[indices[:, column]]
        for (one, two), matrix in self.pairs[kind].items():
            total += matrix[indices[:, one], indices[:, two]]
        return np.maximum(total, 1) if kind in MEASURED else total  # a sum of differences may be none

    def base(self) -> Cost:
        """Return the cost of the base itself."""
        return self.cost({block.name: block.default for block in self.blocks})

    def cheapest(self, kind: str) -> Genotype:
        """Return the genotype of the smallest reachable cost of this kind.

        Every cost grows with every width, and at given widths each block's kernel and kind count for themselves, so
        the narrowest choice of each block that is cheapest beside the narrowest others is the cheapest of all. Of a
        peak the moments in which a block's own kinds run count alone: others may hide them.
        """
        if kind == "ram":
            return self.genotype(self._least_ram())
        return self.genotype([int(totals.argmin()) for totals in self.beside_narrowest(kind)])

    def _least_ram(self) -> list[int]:
        """Return the positions of choices none of which could be changed alone for less ram: the planner of an arena
        leaves gaps, so that it grows not quite with every width."""
        chosen, before = [block.narrowest for block in self.blocks], None
        while chosen != before:
            before = list(chosen)
            for column in range(len(chosen)):
                totals = self._total("ram", self._others_fixed(column, chosen))
                if totals.min() < totals[chosen[column]]:
                    chosen[column] = int(totals.argmin())
        return chosen

    def _others_fixed(self, column: int, chosen: Sequence[int]) -> Vector:
        """Return a row of positions for each choice of one block, beside these of all others."""
        rows = np.tile(np.array(chosen), (len(self.blocks[column].choices), 1))
        rows[:, column] = np.arange(len(rows))
        return rows

    def beside_narrowest(self, kind: str) -> list[Vector]:
        """Return, per block over its choices, the costs of this kind (of a peak: its own) where all other blocks have
        their narrowest choice."""
        narrowest = [block.narrowest for block in self.blocks]
        found = []
        for column in range(len(self.blocks)):
            rows = self._others_fixed(column, narrowest)
            found.append(self._own_peak(column, rows) if kind == "peak_memory" else self._total(kind, rows))
        return found

    def _own_peak(self, column: int, rows: Vector) -> Vector:
        """Return the peak of a block's own moments for each of its choices; wider ones than the narrowest are out."""
        choices = self.blocks[column].choices
        least = min(choice.width for choice in choices)
        totals = self.memory.many(rows, owner=column)
        wide = np.array([choice.width > least and choice.keep for choice in choices])
        return np.where(wide, np.iinfo(np.int64).max, totals)


def is_sum(kind: str) -> bool:
    """Say whether a kind of cost is a sum over blocks and pairs of blocks."""
    return kind not in ("peak_memory", "ram")


def cost_table(analysis: Analysis, network: nn.Module, kinds: Iterable[str] = COUNTED) -> CostTable:
    """Write the costs of an analysed base out by the choices of its blocks, flash and ram too where they are among
    `kinds`. Takes a fraction of a second. Raises ModelError for flash and ram of operators that devices do not get."""
    counts = Counts(analysis)
    polynomials = cost_polynomials(analysis, network, counts)
    costs = {kind: counts.variables.by_choices(polynomial) for kind, polynomial in polynomials.items()}
    memory = memory_table(analysis, counts)
    table = CostTable(blocks=analysis.blocks, memory=memory, **_tables(costs, analysis.blocks))
    return table.with_device(device_table(analysis, counts)) if set(DEVICE) & set(kinds) else table


def _tables(costs: Mapping[str, ByChoices], blocks: Sequence[Block]) -> dict[str, Any]:
    """Constants, vectors per block and matrices per pair of blocks of some sums."""
    nothing = [np.zeros(len(block.choices), dtype=np.int64) for block in blocks]
    return {
        "constants": {kind: cost.constant for kind, cost in costs.items()},
        "single": {
            kind: tuple(cost.single.get(index, zeros) for index, zeros in enumerate(nothing))
            for kind, cost in costs.items()
        },
        "pairs": {kind: cost.pairs() for kind, cost in costs.items()},
    }
