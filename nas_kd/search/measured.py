"""What is measured on whole students of a space, latency and cycles, and the table that expects the others'."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nas_kd.analysis.structure import Analysis
from nas_kd.budget import CYCLES, LATENCY
from nas_kd.costs.cost_table import CostTable
from nas_kd.costs.cycle_table import CycleTable
from nas_kd.costs.latency_table import LatencyTable, Measurements, Meter
from nas_kd.genotype import Choice, Genotype
from nas_kd.networks.micro import Estimator

MEASURING = threading.RLock()  # of one process: trials in threads take turns, or each would slow the other's timing


class MeasuredCosts:
    """Of a space the `table` of all costs, and what was measured for it: `latency` and `cycles`, None until they
    are."""

    base: nn.Module
    analysis: Analysis
    input_size: tuple[int, int, int]
    table: CostTable
    latency: LatencyTable | None = None
    cycles: CycleTable | None = None

    def measure_latency(self, meter: Meter, report: Callable[[str], None] = lambda words: None) -> None:
        """Measures some students of all kinds and widths, from which the latency of all others is expected; `report` is
        told of each. Costs hold a latency from then on. Raises a NasKdError when something cannot be measured."""
        latency = LatencyTable(self.base, self.analysis, self.input_size, meter)
        latency.measure_students(report)
        self.latency = latency
        self.table = latency.onto(self.table)

    def tell_latency(self, meter: Meter, notes: Mapping[str, Any]) -> None:
        """Takes over what another machine measured of this space (`LatencyTable.notes`): no student is timed, all have
        the latency that is expected there. `meter` measures here what is not a student of a trial."""
        self.latency = LatencyTable(self.base, self.analysis, self.input_size, meter)
        self.latency.tell(notes)
        self.table = self.latency.onto(self.table)

    def estimate_cycles(
        self,
        estimator: Estimator,
        store: Measurements | None = None,
        report: Callable[[str], None] = lambda words: None,
    ) -> None:
        """Estimates the cycles of some students, from which those of all others are expected, and keeps that in
        `store`; `report` is told of each. Costs hold cycles from then on. Raises ModelError for a base with operators
        that accelerators do not get."""
        cycles = CycleTable(self.base, self.analysis, self.input_size, estimator, store)
        cycles.estimate_students(report)
        self.cycles = cycles
        self.table = cycles.onto(self.table)

    def tell_cycles(
        self, notes: Mapping[str, Any], estimator: Estimator | None, store: Measurements | None = None
    ) -> None:
        """Takes over what another machine expects of this space (`CycleTable.notes`). Without an `estimator` whole
        students have the cycles that are expected, too."""
        self.cycles = CycleTable(self.base, self.analysis, self.input_size, estimator, store)
        self.cycles.tell(notes)
        self.table = self.cycles.onto(self.table)

    @property
    def _measured(self) -> dict[str, LatencyTable | CycleTable]:
        """The tables of what is measured, by kind."""
        tables = {LATENCY: self.latency, CYCLES: self.cycles}
        return {kind: table for kind, table in tables.items() if table is not None}

    def known(self, genotype: Mapping[str, Choice]) -> dict[str, int]:
        """What was measured of a whole student, by kind."""
        own = Genotype.of(dict(genotype))
        found = {kind: table.known(own) for kind, table in self._measured.items()}
        return {kind: value for kind, value in found.items() if value is not None}

    def _measure(self, kind: str, *genotypes: Genotype, layers: bool = False) -> list[int]:
        """What is measured of whole students, which corrects the table when they are new; `layers` as for latencies."""
        table = self._measured[kind]
        if table.is_told:
            return [table.known(genotype) or self.table.cost(genotype)[kind] for genotype in genotypes]
        with MEASURING:
            new = any(table.known(genotype) is None for genotype in genotypes)
            wholes = functools.partial(table.wholes, layers=layers) if isinstance(table, LatencyTable) else table.wholes
            measured = wholes(genotypes)
            if new:
                self.table = table.onto(self.table)
        return measured

    def _elsewhere(self, kind: str, analysis: Analysis, genotype: Genotype) -> int:
        """What is measured of a student of the base with other choices open."""
        if kind == CYCLES:
            assert self.cycles is not None
            return CycleTable(self.base, analysis, self.input_size, self.cycles.estimator).whole(genotype)
        assert self.latency is not None
        return LatencyTable(self.base, analysis, self.input_size, self.latency.meter).whole(genotype)

    def _smallest(self, kind: str) -> int:
        """The smallest reachable cost; of what is measured the smallest that a whole student was found to have."""
        cheapest = self.table.cheapest(kind)
        table = self._measured.get(kind)
        if table is None or (isinstance(table, CycleTable) and table.is_told):
            return self.table.cost(cheapest)[kind]
        self._measure(kind, cheapest)
        return table.least()
