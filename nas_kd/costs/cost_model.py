"""What every student of a base costs: counted in closed form, or measured on whole students and expected of others."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from nas_kd.analysis.structure import Analysis
from nas_kd.budget import ACCELERATOR, CYCLES, DEVICE, LATENCY, MEASURED, Budget, Cost
from nas_kd.costs.cost_table import CostTable, cost_table
from nas_kd.costs.cost_terms import Counts
from nas_kd.costs.cycle_table import CycleTable
from nas_kd.costs.device import device_table
from nas_kd.costs.latency_table import LatencyTable, Measurements, Meter
from nas_kd.costs.runtimes import LatencySpec
from nas_kd.genotype import Choice, Genotype
from nas_kd.networks.micro import Estimator

MEASURING = threading.RLock()  # of one process: trials in threads take turns, or each would slow the other's timing
Report = Callable[[str], None]


class CostModel:
    """The costs of every student of a base.

    Attributes: `base` and `analysis`; `latency` and `cycles`, what is known of them, None where
    nothing is; `table`, the costs of all students. Params, MACs and memory are counted exactly. Latency and cycles are
    measured on whole students, `known` from then on, and each of these corrects what `table` expects of the others:
    that alone changes. What more is to be told is another model (`with_device`, `with_latency`, `with_cycles`), which
    shares what was measured.
    """

    def __init__(self, base: nn.Module, analysis: Analysis) -> None:
        self.base, self.analysis = base, analysis
        self.latency: LatencyTable | None = None
        self.cycles: CycleTable | None = None
        self.table: CostTable = cost_table(analysis, base)

    def with_device(self) -> CostModel:
        """A model that counts what the int8 form takes on a device, too: flash and ram. Raises ModelError for a base
        with operators that interpreters on devices do not get."""
        if self.table.device is not None:
            return self
        return self._with(table=self.table.with_device(device_table(self.analysis, Counts(self.analysis))))

    def with_latency(self, meter: Meter, report: Report = lambda words: None) -> CostModel:
        """A model that tells latencies: some students of all kinds and widths are measured, from which the latency of
        all others is expected; `report` is told of each. Raises a NasKdError when something cannot be measured."""
        latency = self.latencies(meter)
        latency.measure_students(report)
        return self._with(latency=latency, table=latency.onto(self.table))

    def with_told_latency(self, meter: Meter, notes: Mapping[str, Any]) -> CostModel:
        """A model that tells what another machine measured (`LatencyTable.notes`): no student is timed, all have the
        latency that is expected there. `meter` measures here what is not a student of a trial."""
        latency = self.latencies(meter)
        latency.tell(notes)
        return self._with(latency=latency, table=latency.onto(self.table))

    def with_cycles(
        self, estimator: Estimator, store: Measurements | None = None, report: Report = lambda words: None
    ) -> CostModel:
        """A model that tells cycles: those of some students are estimated, and kept in `store`, from which those of all
        others are expected; `report` is told of each. Raises ModelError for a base with operators that accelerators do
        not get."""
        cycles = CycleTable(self.base, self.analysis, self.analysis.input_size, estimator, store)
        cycles.estimate_students(report)
        return self._with(cycles=cycles, table=cycles.onto(self.table))

    def with_told_cycles(
        self, notes: Mapping[str, Any], estimator: Estimator | None, store: Measurements | None = None
    ) -> CostModel:
        """A model that tells what another machine expects (`CycleTable.notes`). Without an `estimator` whole students
        have the cycles that are expected, too."""
        cycles = CycleTable(self.base, self.analysis, self.analysis.input_size, estimator, store)
        cycles.tell(notes)
        return self._with(cycles=cycles, table=cycles.onto(self.table))

    def telling(self, kinds: Collection[str]) -> CostModel:
        """A model that tells these kinds of cost, too. What was not measured before is now: latency by torch on
        one thread of this machine, cycles of the accelerator `ACCELERATOR`."""
        model = self.with_device() if set(DEVICE) & set(kinds) else self
        if LATENCY in kinds and model.latency is None:
            model = model.with_latency(Meter(LatencySpec()))
        if CYCLES in kinds and model.cycles is None:
            model = model.with_cycles(Estimator(ACCELERATOR))
        return model

    def latencies(self, meter: Meter, analysis: Analysis | None = None) -> LatencyTable:
        """A table without any latency yet; of the base with other choices open in another `analysis`."""
        return LatencyTable(self.base, analysis or self.analysis, self.analysis.input_size, meter)

    def whole_models(self, meter: Meter) -> LatencyTable:
        """What measures whole students on this machine: the latencies that are known, or a table that knows of none."""
        return self.latency if self.latency is not None and not self.latency.is_told else self.latencies(meter)

    def _with(self, **changes: Any) -> CostModel:
        model = copy.copy(self)
        vars(model).update(changes)
        return model

    @property
    def _measured(self) -> dict[str, LatencyTable | CycleTable]:
        tables = {LATENCY: self.latency, CYCLES: self.cycles}
        return {kind: table for kind, table in tables.items() if table is not None}

    def known(self, genotype: Mapping[str, Choice]) -> dict[str, int]:
        """What was measured of a whole student, by kind."""
        own = Genotype.of(dict(genotype))
        found = {kind: table.known(own) for kind, table in self._measured.items()}
        return {kind: value for kind, value in found.items() if value is not None}

    def cost(self, genotype: Mapping[str, Choice]) -> Cost:
        """The cost of a student: exact, its latency and cycles its own or, until those are measured, the table's.
        Raises GenotypeError for a genotype of another base."""
        self.analysis.check(genotype)
        return dataclasses.replace(self.table.cost(genotype), **self.known(genotype))

    def base_cost(self) -> Cost:
        """The cost of the base itself, its latency and cycles as they were measured."""
        return self.cost(self.analysis.identity)

    def measure(self, kind: str, *genotypes: Genotype, layers: bool = False) -> list[int]:
        """What is measured of whole students, turn by turn; those that are new correct the table. `layers` as for
        latencies."""
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

    def recall(self, latencies: Mapping[Genotype, int]) -> None:
        """Takes over latencies (nanoseconds) of whole students that were measured elsewhere or before."""
        if self.latency is None:
            return
        with MEASURING:
            for genotype, nanoseconds in latencies.items():
                if self.latency.known(genotype) is None:
                    self.latency.observe(genotype, nanoseconds)
            self.table = self.latency.onto(self.table)

    def measure_opened(self, kind: str, analysis: Analysis, genotype: Genotype) -> int:
        """What is measured of a student of the base with other choices open."""
        if kind == CYCLES:
            assert self.cycles is not None
            return CycleTable(self.base, analysis, self.analysis.input_size, self.cycles.estimator).whole(genotype)
        assert self.latency is not None
        return self.latencies(self.latency.meter, analysis).whole(genotype)

    def smallest(self, kind: str) -> int:
        """The smallest reachable cost; of what is measured the smallest that a whole student was found to have."""
        cheapest = self.table.cheapest(kind)
        table = self._measured.get(kind)
        if table is None or (isinstance(table, CycleTable) and table.is_told):
            return self.table.cost(cheapest)[kind]
        self.measure(kind, cheapest)
        return table.least()


def measured_in(budget: Budget | None) -> list[str]:
    """The kinds of cost that a budget bounds and that are measured on whole students."""
    return [kind for kind in MEASURED if kind in (budget or ())]
