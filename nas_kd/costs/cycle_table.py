"""Cycles as a cost: what Vela, Arm's compiler, estimates for an Ethos-U, and what it is expected to estimate.

Vela estimates each operator by itself, and one student takes it a tenth of a second. Some students are estimated before
the search, each choice of each block in several of them. What a layer takes, with what follows it until the next, is
then what was seen beside the same choices of the one or two blocks that it depends on; of pairs that were not seen
together what each choice does to the amounts of `layer_times`. What decides is always a whole student's own estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from nas_kd.analysis.structure import Analysis, Block, genotype_of, row_of
from nas_kd.analysis.trace import without_storage
from nas_kd.budget import CYCLES
from nas_kd.costs.cost_table import CostTable
from nas_kd.costs.draft import Draft, drafted
from nas_kd.costs.latency_table import Measurements
from nas_kd.costs.layer_times import Floats, Observed, Terms, expected, fit_times, layers_of, summed
from nas_kd.costs.polynomial import Vector
from nas_kd.files.digests import digest_of
from nas_kd.genotype import Choice, Genotype
from nas_kd.networks.micro import Estimator
from nas_kd.students.building import build_student

STUDENTS = 120  # that are estimated before the search
_ROUNDS = 3  # in which what single choices do is divided between two blocks
_UNSEEN = 0.1, 0.25  # students that say that a choice, or a pair of them, is as the amounts have it


class CycleTable:
    """The cycles of every student of a base as a sum, and of those that were estimated as whole models.

    `estimate_students` fills it, or `tell` with the `notes` of another machine's. Without an `estimator` it knows what
    it is told. Estimates are kept in `store`.
    """

    def __init__(
        self,
        base: nn.Module,
        analysis: Analysis,
        input_size: Sequence[int],
        estimator: Estimator | None,
        store: Measurements | None = None,
    ) -> None:
        self.base, self.analysis, self.estimator = without_storage(base).eval(), analysis, estimator
        self._input_size = tuple(input_size)
        self._store: Measurements = {} if store is None else store
        self._layers = layers_of(analysis)
        self._observed: dict[str, Observed] = {}
        self._told: Terms | None = None

    @property
    def is_told(self) -> bool:
        """Whether it knows nothing but what another machine noted."""
        return self.estimator is None

    def estimate_students(self, report: Callable[[str], None] = lambda words: None) -> None:
        """Estimates the base and some students; `report` is told of each. Raises ModelError for a base that the way to
        devices cannot take."""
        for number, genotype in enumerate((self.analysis.identity, *evenly_drawn(self.analysis.blocks, STUDENTS - 1))):
            self.whole(genotype)
            report(f"student {number}" if number else "base")

    def notes(self) -> dict[str, Any]:
        """What is expected of all students, as JSON values."""
        sums = {" ".join(map(str, blocks)): np.rint(own).astype(int).tolist() for blocks, own in self.sums().items()}
        return {"base": self.whole(self.analysis.identity), "sums": sums}

    def tell(self, notes: Mapping[str, Any]) -> None:
        """Takes over what another machine expects and noted."""
        sums = notes["sums"].items()
        self._told = {tuple(map(int, blocks.split())): np.array(own, dtype=float) for blocks, own in sums}
        base = self.analysis.identity
        self._observed[base.digest] = Observed(row=row_of(self.analysis.blocks, base), total=float(notes["base"]))

    def whole(self, genotype: Mapping[str, Choice]) -> int:
        """The cycles of a whole student, estimated now or before."""
        return self.wholes([Genotype.of(dict(genotype))])[0]

    def wholes(self, genotypes: Sequence[Genotype]) -> list[int]:
        """The cycles of whole students."""
        for genotype in genotypes:
            if genotype.digest not in self._observed:
                self._observed[genotype.digest] = self._estimated(genotype)
        return [int(self._observed[genotype.digest].total) for genotype in genotypes]

    def known(self, genotype: Genotype) -> int | None:
        """The cycles of a whole student, None when they were not estimated."""
        found = self._observed.get(genotype.digest)
        return None if found is None else int(found.total)

    def least(self) -> int:
        """The fewest cycles of those whole students that were estimated."""
        return min(int(student.total) for student in self._observed.values())

    def sums(self) -> Terms:
        """What layers take together, as a sum over blocks and pairs of blocks."""
        if self._told is not None:
            return self._told
        students = [student for _, student in sorted(self._observed.items())]
        times = fit_times(self._layers, students)
        rows = np.stack([student.row for student in students])
        total: dict[tuple[int, ...], Floats] = {}
        for layer in self._layers:
            seen = np.array([student.layers.get(layer.module, 0.0) for student in students])
            own = summed([layer], times)
            if len(layer.blocks) <= 2:
                grid = _grid(layer.blocks, self.analysis.blocks)
                own = {layer.blocks: _refined(expected(layer, times, grid), layer.blocks, grid, rows, seen)}
            for blocks, numbers in own.items():
                total[blocks] = total.get(blocks, np.zeros(())) + numbers
        return total

    def onto(self, table: CostTable) -> CostTable:
        """A cost table with these sums as its cycles."""
        return table.with_measured(CYCLES, self.sums())

    def _estimated(self, genotype: Genotype) -> Observed:
        assert self.estimator is not None
        if genotype.digest not in self._store:
            draft = drafted(build_student(self.base, self.analysis, genotype), self._input_size)
            self._store[genotype.digest] = self._by_layer(draft, self.estimator.cycles(draft.content))
        layers = self._store[genotype.digest]
        row = row_of(self.analysis.blocks, genotype)
        return Observed(row=row, total=float(sum(layers.values())), layers=layers)

    def _by_layer(self, draft: Draft, cycles: Sequence[int]) -> dict[str, int]:
        """The cycles of each layer with what follows it: of an operator those of the layer that its module is of."""
        names = {layer.module for layer in self._layers}
        own, spent = self._layers[0].module, dict.fromkeys(names, 0)
        for module, amount in zip(draft.modules, cycles, strict=False):
            own = next((path for path in _around(module) if path in names), own)
            spent[own] += amount
        return {name: amount for name, amount in spent.items() if amount}


def _around(module: str) -> Iterator[str]:
    """A module's path, and those of the modules around it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _grid(blocks: Sequence[int], among: Sequence[Block]) -> Vector:
    """Rows of positions with all choices of some blocks, those of the others of no matter."""
    lengths = [len(among[block].choices) for block in blocks]
    grid = np.zeros((int(np.prod(lengths)), len(among)), dtype=np.int64)
    grid[:, list(blocks)] = np.stack([axis.ravel() for axis in np.indices(lengths)], axis=1) if blocks else 0
    return grid


def _refined(amounts: Floats, blocks: Sequence[int], grid: Vector, rows: Vector, seen: Floats) -> Floats:
    """What a layer takes by the choices of `blocks`: near its `amounts` on the `grid` of them, as `seen` in students
    with these `rows`; an array with a dimension for each block."""
    lengths = [1 + int(grid[:, block].max()) for block in blocks]
    places = np.ravel_multi_index(tuple(rows[:, list(blocks)].T), lengths) if blocks else np.zeros(len(rows), dtype=int)
    for _ in range(_ROUNDS):
        for block, length in zip(blocks, lengths, strict=True) if len(blocks) > 1 else ():
            little = _UNSEEN[0] * amounts.mean() + 1e-9
            sums = [np.bincount(rows[:, block], own, length) + little for own in (seen, amounts[places])]
            amounts = amounts * (sums[0] / np.maximum(sums[1], 1e-9))[grid[:, block]]
    left = np.bincount(places, seen - amounts[places], len(grid))
    return np.asarray(amounts + left / (np.bincount(places, minlength=len(grid)) + _UNSEEN[1])).reshape(lengths)


def evenly_drawn(blocks: Sequence[Block], count: int, seed: int = 0) -> list[Genotype]:
    """Random genotypes in which each choice of a block is as frequent as the others."""
    generator = np.random.default_rng(seed)
    columns = []
    for block in blocks:
        times = -(-count // len(block.choices))
        columns.append(np.concatenate([generator.permutation(len(block.choices)) for _ in range(times)])[:count])
    return [genotype_of(blocks, row) for row in np.stack(columns, axis=1)]


def cycles_key(estimator: Estimator, base: nn.Module, input_size: Sequence[int]) -> str:
    """Names the file of estimates: of this compiler, accelerator and base. Raises as `drafted` does."""
    facts = repr(estimator.facts).encode() + drafted(base, input_size).content
    return digest_of(facts)
