"""The multiple-choice knapsack behind a budget: one choice per block, every bound a row, the least damage.

The product of two blocks' widths is made linear with one variable per pair of choices that differ in cost
(Glover & Woolsey 1974), and what is alive only where blocks are kept by a variable of its own that cannot be less
(McCormick 1976), so that a proof that there is no genotype is exact.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from nas_kd.budget import Budget
from nas_kd.costs.cost_table import CostTable, is_sum
from nas_kd.costs.peak_memory import MemoryTable, MomentTable
from nas_kd.genotype import Genotype

_INFEASIBLE = 2  # scipy's status
Row = tuple[NDArray[np.float64], float]  # coefficients, and what their sum may be at most


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pair:
    """Two blocks whose costs multiply: where their pair variables begin, and to which class each choice belongs."""

    blocks: tuple[int, int]
    start: int
    rows: NDArray[np.int64]  # choice of the first block → its class
    columns: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.rows.max()) + 1, int(self.columns.max()) + 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Product:
    """A number per choice of one block times numbers per choice of others: `variable` is its share of its largest."""

    variable: int
    factors: tuple[tuple[int, NDArray[np.int64]], ...]  # by block

    @property
    def largest(self) -> int:
        return math.prod(int(vector.max()) for _, vector in self.factors)


def solve(
    table: CostTable,
    budget: Budget,
    damages: Sequence[NDArray[np.float64]] | None = None,
    *,
    seconds: float = 10.0,
    gap: float = 0.0,
) -> Genotype | None:
    """The genotype within `budget` whose damages, one array per block over its choices, have the smallest sum.

    With a `gap` the sum may be larger by that fraction: at 0.01 in half the time. Without `damages` any genotype within
    the budget will do. None is a proof that there is none; a search that takes longer than `seconds` gives the best
    found so far, and raises TimeoutError when there is none yet.
    """
    sums = Budget(tuple((kind, bound) for kind, bound in budget.bounds if is_sum(kind)))
    limits = _memory_limits(table, budget)
    problem = _Problem(table, tuple(sums), {kind: limits[kind][0] for kind in limits})
    objective = np.zeros(problem.size)
    for start, block_damages in zip(problem.starts, damages or (), strict=False):
        objective[start : start + len(block_damages)] = block_damages
    constraints = [problem.one_choice_each(), *problem.links(), *([problem.within(sums)] if sums else [])]
    bounds = {kind: bound for kind, (_, bound) in limits.items()}
    deadline, is_tightened = time.monotonic() + seconds, False
    while (left := deadline - time.monotonic()) > 0:
        with _SILENCE:
            result = milp(
                objective,
                integrality=problem.integrality(),
                bounds=Bounds(0, problem.useful(damages or (), bounds)),
                constraints=[*constraints, *(problem.within_memory(kind, bound) for kind, bound in bounds.items())],
                options={"time_limit": left, **({"mip_rel_gap": gap} if gap else {})},
            )
        if result.x is None and result.status == _INFEASIBLE and not is_tightened:
            return None
        if result.x is None:
            break
        genotype = problem.genotype(result.x)
        cost = table.cost(genotype)
        if budget.admits(cost):
            return genotype
        if "ram" in budget and cost.ram > budget["ram"]:  # its planner leaves gaps, which no sum tells of
            bounds["ram"], is_tightened = bounds["ram"] * budget["ram"] / cost.ram, True
        else:
            # HiGHS works to a tolerance, a hard bound is hard: this one is out, whatever else is as close is not
            constraints.append(problem.without(genotype))
    if is_tightened and budget.admits(table.cost(least := table.cheapest("ram"))):
        return least  # nothing else may fit
    raise TimeoutError(f"no genotype within {budget} was found in {seconds:.0f} s: give it more, or a wider budget")


def _memory_limits(table: CostTable, budget: Budget) -> dict[str, tuple[MemoryTable, float]]:
    """By kind of memory that is bounded, the moments that are, and by how much. An arena holds at least what is alive
    at once and the smallest tail."""
    limits = {}
    if "peak_memory" in budget:
        limits["peak_memory"] = table.memory, budget["peak_memory"]
    if "ram" in budget and table.device is not None:
        limits["ram"] = table.device.alive, max(1.0, budget["ram"] - table.device.least_tail)
    return limits


class _Silence:
    """HiGHS now and then writes a line of its own to the process's standard output, whatever it is told. That goes
    nowhere while any thread is inside."""

    def __init__(self) -> None:
        self._lock, self._inside, self._kept = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                sys.stdout.flush()
                self._kept = os.dup(1)
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), 1)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                os.dup2(self._kept, 1)
                os.close(self._kept)


_SILENCE = _Silence()


class _Problem:
    """The variables: one per block and choice, then one per pair of blocks and pair of choice classes, then one per
    product in the sums of memory."""

    def __init__(self, table: CostTable, kinds: tuple[str, ...], memories: Mapping[str, MemoryTable]) -> None:
        self.table, self.kinds, self.memories = table, kinds, memories
        lengths = [len(block.choices) for block in table.blocks]
        self.starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(int)
        self.choices = int(sum(lengths))
        self.pairs: list[_Pair] = []
        self.size = self.choices
        for pair in dict.fromkeys(pair for kind in kinds for pair in table.pairs[kind]):
            self._add_pair(pair)
        self.products: dict[str, list[list[_Product]]] = {kind: [] for kind in memories}  # of each sum of memory
        for kind, memory in memories.items():
            for _, amount in memory.sums:
                numbers = itertools.count(self.size)
                own = [_Product(variable=next(numbers), factors=tuple(f.items())) for f in amount.products]
                self.products[kind].append(own)
                self.size += len(own)

    def _matrix(self, kind: str, pair: tuple[int, int]) -> NDArray[np.int64]:
        shape = tuple(len(self.table.blocks[index].choices) for index in pair)
        return self.table.pairs[kind].get(pair, np.zeros(shape, dtype=np.int64))

    def _add_pair(self, pair: tuple[int, int]) -> None:
        """Choices that cost the same beside every choice of the other block need one variable between them."""
        stacked = np.concatenate([self._matrix(kind, pair) for kind in self.kinds], axis=1)
        rows = np.unique(stacked, axis=0, return_inverse=True)[1].ravel()
        stacked = np.concatenate([self._matrix(kind, pair) for kind in self.kinds], axis=0)
        columns = np.unique(stacked, axis=1, return_inverse=True)[1].ravel()
        added = _Pair(blocks=pair, start=self.size, rows=rows, columns=columns)
        self.pairs.append(added)
        self.size += added.shape[0] * added.shape[1]

    def integrality(self) -> NDArray[np.int64]:
        """Choices are whole; pair variables then are of themselves."""
        whole = np.zeros(self.size, dtype=np.int64)
        whole[: self.choices] = 1
        return whole

    def useful(self, damages: Sequence[NDArray[np.float64]], bounds: Mapping[str, float]) -> NDArray[np.float64]:
        """What variables may be at most: 0 for a choice that another of its block is as good as, in damage, in each
        cost beside whatever others have, at each moment of memory. These are a third to two thirds."""
        most = np.ones(self.size)
        for block, start in enumerate(self.starts):
            as_good = np.ones((len(self.table.blocks[block].choices),) * 2, dtype=bool)  # the first as the second
            for worth in (*(own[:, None] for own in damages[block : block + 1]), *self._amounts(block, bounds)):
                as_good &= (worth[:, None] <= worth[None]).all(axis=-1)
            better = as_good & (~as_good.T | np.triu(np.ones_like(as_good), k=1))  # of equals the first stays
            most[start : start + len(better)] = ~better.any(axis=0)
        return most

    def _amounts(self, block: int, bounds: Mapping[str, float]) -> Iterator[NDArray[Any]]:
        """All that constraints hold of a block, each choices × whatever it stands beside."""
        for kind in self.kinds:
            yield self.table.single[kind][block][:, None]
            for blocks, matrix in self.table.pairs[kind].items():
                if block in blocks:
                    yield np.moveaxis(matrix, blocks.index(block), 0)
        for kind, memory in self.memories.items():
            for part in memory.parts:
                if block in part.blocks:
                    over = np.moveaxis(part.table > bounds[kind], part.blocks.index(block), 0)
                    yield over.reshape(len(over), -1)
            for _, amount in memory.sums:
                factors = (amount.single, *amount.products)
                yield from (own[block][:, None] for own in factors if block in own)

    def one_choice_each(self) -> LinearConstraint:
        counts = [len(block.choices) for block in self.table.blocks]
        block_of_choice = np.repeat(np.arange(len(counts)), counts)
        shape = (len(counts), self.size)
        matrix = scipy.sparse.csr_array(
            (np.ones(self.choices), (block_of_choice, np.arange(self.choices))), shape=shape
        )
        return LinearConstraint(matrix, 1, 1)

    def links(self) -> list[LinearConstraint]:
        """The pair variables of a class sum to the choices of that class, on both sides."""
        links = []
        for pair in self.pairs:
            variables = pair.start + np.arange(pair.shape[0] * pair.shape[1]).reshape(pair.shape)
            for block, classes, grid in (
                (pair.blocks[0], pair.rows, variables),
                (pair.blocks[1], pair.columns, variables.T),
            ):
                lines = np.repeat(np.arange(len(grid)), grid.shape[1])
                choices = self.starts[block] + np.arange(len(classes))
                data = np.concatenate([np.ones(grid.size), -np.ones(len(classes))])
                place = (np.concatenate([lines, classes]), np.concatenate([grid.ravel(), choices]))
                links.append(
                    LinearConstraint(scipy.sparse.csr_array((data, place), shape=(len(grid), self.size)), 0, 0)
                )
        return links

    def within(self, budget: Budget) -> LinearConstraint:
        """One row per bound, scaled to it."""
        rows, limits = [], []
        for kind, bound in budget.items():
            row = np.zeros(self.size)
            row[: self.choices] = np.concatenate(self.table.single[kind])
            for pair in self.pairs:
                costs = np.zeros(pair.shape)
                costs[pair.rows[:, None], pair.columns[None, :]] = self._matrix(kind, pair.blocks)
                row[pair.start : pair.start + costs.size] = costs.ravel()
            rows.append(row / bound)
            limits.append(1 - self.table.constants[kind] / bound)
        return LinearConstraint(scipy.sparse.csr_array(np.array(rows)), -np.inf, np.array(limits))

    def genotype(self, solution: NDArray[np.float64]) -> Genotype:
        """The choices with the largest value."""
        chosen = [
            int(solution[start : start + len(block.choices)].argmax())
            for start, block in zip(self.starts, self.table.blocks, strict=True)
        ]
        return self.table.genotype(chosen)

    def without(self, genotype: Genotype) -> LinearConstraint:
        """Any genotype but this one."""
        row = np.zeros(self.size)
        row[self.starts + self.table.indices(genotype)] = 1
        return LinearConstraint(scipy.sparse.csr_array(row[None]), -np.inf, len(self.starts) - 1)

    def within_memory(self, kind: str, bound: float) -> LinearConstraint:
        """No moment of this kind of memory may hold more than `bound`: what choices of a few blocks exceed it together
        are not taken at once, and the sums of many blocks are rows of their own."""
        memory = self.memories[kind]
        rows: list[Row] = [row for part in memory.parts for row in self._exclusions(part, bound)]
        for (_, amount), products in zip(memory.sums, self.products[kind], strict=True):
            row = np.zeros(self.size)
            for block, vector in amount.single.items():
                row[self.starts[block] : self.starts[block] + len(vector)] += vector
            for product in products:
                row[product.variable] = product.largest
                rows += self._at_least(product)
            rows.append((row / bound, 1 - amount.constant / bound))
        rows.append((np.zeros(self.size), 0.0))
        matrix, limits = zip(*rows, strict=True)
        return LinearConstraint(scipy.sparse.csr_array(np.array(matrix)), -np.inf, np.array(limits))

    def _at_least(self, product: _Product) -> Iterator[Row]:
        """The variable of a product is no less than the product: one row for each combination of values of all factors
        but one, which says nothing unless these values are taken. (It need not be equal: less is always allowed.)"""
        (block, vector), *others = product.factors
        values = [np.unique(other[other > 0]) for _, other in others]
        for combination in itertools.product(*values):
            rest = math.prod(map(int, combination)) / product.largest
            row = np.zeros(self.size)
            row[self.starts[block] : self.starts[block] + len(vector)] = vector * rest
            most = float(vector.max()) * rest
            for (other, numbers), value in zip(others, combination, strict=True):
                row[self.starts[other] + np.flatnonzero(numbers == value)] += most
            row[product.variable] = -1
            yield row, most * len(others)

    def _exclusions(self, part: MomentTable, bound: float) -> Iterator[Row]:
        """For each combination of choices of all its blocks but the last, those of the last that exceed the bound."""
        if not part.blocks:
            if part.table.max() > bound:
                yield np.zeros(self.size), -1.0
            return
        *first, last = part.blocks
        over = part.table > bound
        for chosen in np.ndindex(*over.shape[:-1]):
            if over[chosen].any():
                row = np.zeros(self.size)
                row[self.starts[last] : self.starts[last] + over.shape[-1]] = over[chosen]
                row[[self.starts[block] + choice for block, choice in zip(first, chosen, strict=True)]] = 1
                yield row, float(len(first))
