"""Latency as a cost: students are timed whole, and what their layers took is what others are expected to take.

Some students are timed before the search, layer by layer where the runtime tells (`layer_times`), and a straight line
through what they took as wholes corrects the sum. What decides is always a whole student's own latency. Every
measurement is made once and kept: decisions do not change when a study is resumed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from nas_kd.analysis.structure import Analysis, Block, row_of
from nas_kd.budget import LATENCY
from nas_kd.costs.cost_table import CostTable
from nas_kd.costs.latency import Timing
from nas_kd.costs.layer_times import Layer, Observed, Terms, fit_times, layers_of, summed, total_of
from nas_kd.costs.runtimes import REFERENCE, LatencySpec, Measure, Measured, Subject, measurer
from nas_kd.files.digests import digest_of
from nas_kd.genotype import Choice, Genotype
from nas_kd.students.building import build_student

ROUGH = Timing(warmup=1, repeats=2, tolerance=0.015, limit_s=0.06)  # of one student of many
WHOLE = Timing(warmup=2, repeats=3, tolerance=0.008, limit_s=0.4)  # of one that is decided on
STUDENTS = 24  # that are timed before the search
_TOGETHER = 6  # subjects that take turns with their reference
_OFFSET, _SLOPE = 0.1, 0.5  # standard deviations: what a correction may be, in times of the base
_NOISE, _ROUGH_NOISE = 0.02, 0.08  # of whole students around the line, as fractions of what they take
_LEAST_SLOPE = 0.1
_DROPPED = 0.6  # how often a block is dropped, beside each of its kinds
_SPREAD = 0.25  # of widths around a student's own level


class Measurements(Protocol):
    """Where measurements are kept: JSON objects by key, a dict or a file of records."""

    def __contains__(self, key: str, /) -> bool: ...
    def __getitem__(self, key: str, /) -> dict[str, Any]: ...
    def __setitem__(self, key: str, record: dict[str, Any], /) -> None: ...


class Meter:
    """Measures modules as a `LatencySpec` says, each one once: what was measured is looked up in `store`.

    Modules are told apart by their structure and the shapes that go in. A module is measured beside a reference, turn
    by turn, and keeps its ratio to what the reference took at first: a machine that is busier than then treats both
    alike. A user's command has no reference.
    """

    def __init__(self, spec: LatencySpec, *, store: Measurements | None = None, measure: Measure | None = None) -> None:
        self.spec = spec
        self.store: Measurements = {} if store is None else store
        self._measure = measure or measurer(spec)
        self.measured = 0  # modules that were not in the store

    def milliseconds(self, reference: Subject, subjects: Iterable[Subject], timing: Timing) -> Iterator[Measured]:
        """The latencies of some subjects, as they are known; that of the reference itself is among them if given."""
        keys: list[str] = []
        waiting: dict[str, Subject] = {}
        for subject in subjects:
            keys.append(key := self._kept_as(subject, timing))
            if key not in self.store:
                waiting[key] = subject
            if len(waiting) == _TOGETHER:
                self._all(reference, waiting, timing)
                yield from map(self._known, keys)
                keys, waiting = [], {}
        self._all(reference, waiting, timing)
        yield from map(self._known, keys)

    def _kept_as(self, subject: Subject, timing: Timing) -> str:
        """The key of a subject; that of its layers where it was measured with them and is asked for as a whole."""
        key = _key(subject, timing)
        if subject.layers or key in self.store:
            return key
        layered = _key(subject, timing, layers=True)
        return layered if layered in self.store else key

    def alone(self, reference: Subject) -> float:
        """The milliseconds of a reference, by itself."""
        key = _key(reference, WHOLE)
        if key not in self.store:
            self._keep(key, self._measure({REFERENCE: reference}, WHOLE)[REFERENCE])
        return float(self.store[key]["ns"]) / 1e6

    def _all(self, reference: Subject, fresh: Mapping[str, Subject], timing: Timing) -> None:
        if fresh and self.spec.command:
            for key, measured in self._measure(fresh, timing).items():
                self._keep(key, measured)
        elif fresh:
            base = self.alone(reference)
            found = self._measure({REFERENCE: reference, **fresh}, timing)
            pace = base / found.pop(REFERENCE).milliseconds
            for key, measured in found.items():
                self._keep(key, measured.times(pace))

    def _known(self, key: str) -> Measured:
        record = self.store[key]
        layers = {name: ns / 1e6 for name, ns in record.get("layers", {}).items()}
        return Measured(milliseconds=record["ns"] / 1e6, layers=layers)

    def _keep(self, key: str, measured: Measured) -> None:
        layers = {name: round(time * 1e6) for name, time in measured.layers.items()}
        record: dict[str, Any] = {"ns": max(1, round(measured.milliseconds * 1e6))}
        self.store[key] = {**record, "layers": layers} if layers else record
        self.measured += 1


class LatencyTable:
    """The latency of every student of a base as a sum, and of those that were measured as whole models.

    `measure_students` fills it, or `tell` with the `notes` of another machine's; `wholes` measures students; `onto`
    gives a cost table what is expected of all others.
    """

    def __init__(self, base: nn.Module, analysis: Analysis, input_size: Sequence[int], meter: Meter) -> None:
        self.base, self.analysis, self.meter = base, analysis, meter
        device = next((tensor.device for tensor in base.parameters()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randn(meter.spec.batch, *input_size, generator=generator).to(device)
        self._exact: dict[str, int] = {}  # nanoseconds by digest
        self._observed: dict[str, Observed] = {}
        self.is_told = False  # measured on another machine

    @functools.cached_property
    def _reference(self) -> Subject:
        return self._subject(self.analysis.identity)

    @functools.cached_property
    def _layers(self) -> list[Layer]:
        return layers_of(self.analysis)

    @property
    def whole_base(self) -> int:
        """The latency of the base (nanoseconds)."""
        return self.whole(self.analysis.identity)

    def measure_students(self, report: Callable[[str], None] = lambda words: None) -> None:
        """Measures the base and some students of all kinds and widths, layer by layer; `report` is told of each.
        Raises ModelError when something cannot be run."""
        self.whole(self.analysis.identity)
        report("base")
        chosen = list(dict.fromkeys([self.analysis.identity, *drawn(self.analysis.blocks, STUDENTS - 1)]))
        subjects = (self._subject(genotype, layers=True) for genotype in chosen)
        found = self.meter.milliseconds(self._reference, subjects, ROUGH)
        for number, (genotype, measured) in enumerate(zip(chosen, found, strict=True), 1):
            self._observed[genotype.digest] = self._seen(genotype, measured)
            report(f"student {number}")

    def notes(self) -> dict[str, Any]:
        """What was measured, as JSON values."""
        observed = {
            digest: {"row": one.row.tolist(), "total": one.total, "layers": dict(one.layers)}
            for digest, one in self._observed.items()
        }
        return {"exact": dict(self._exact), "observed": observed}

    def tell(self, notes: Mapping[str, Any]) -> None:
        """Takes over what another machine measured and noted."""
        self._exact.update(notes["exact"])
        for digest, one in notes["observed"].items():
            self._observed[digest] = Observed(row=np.array(one["row"]), total=one["total"], layers=one["layers"])
        self.is_told = True

    def whole(self, genotype: Mapping[str, Choice]) -> int:
        """The latency of a whole student (nanoseconds): measured, or as it was measured before."""
        return self.wholes([Genotype.of(dict(genotype))])[0]

    def wholes(self, genotypes: Sequence[Genotype], *, layers: bool = False) -> list[int]:
        """The latencies of whole students (nanoseconds): measured turn by turn, or as they were measured before; with
        `layers` also what their layers take, for a better fit."""
        new = [genotype for genotype in dict.fromkeys(genotypes) if genotype.digest not in self._exact]
        if self.analysis.identity in new:
            new.remove(self.analysis.identity)
            self._exact[self.analysis.identity.digest] = round(1e6 * self.meter.alone(self._reference))
        subjects = (self._subject(genotype, layers=layers) for genotype in new)
        for genotype, measured in zip(new, self.meter.milliseconds(self._reference, subjects, WHOLE), strict=True):
            self.observe(genotype, round(1e6 * measured.milliseconds))
            self._observed[genotype.digest] = self._seen(genotype, measured)
        return [self._exact[genotype.digest] for genotype in genotypes]

    def other(self, network: nn.Module) -> int:
        """The latency of a network of other origin on the same images (nanoseconds), measured beside the base."""
        subject = Subject(module=network.eval(), arguments=(self._images,))
        (measured,) = self.meter.milliseconds(self._reference, [subject], WHOLE)
        return round(1e6 * measured.milliseconds)

    def known(self, genotype: Genotype) -> int | None:
        """The latency of a whole student, None when it was not measured."""
        return self._exact.get(genotype.digest)

    def least(self) -> int:
        """The smallest latency of those whole students that were measured."""
        return min(self._exact.values())

    def observe(self, genotype: Genotype, nanoseconds: int) -> None:
        """Notes what a whole student took: it corrects the sums."""
        self._exact[genotype.digest] = nanoseconds
        self._observed[genotype.digest] = self._seen(genotype, Measured(milliseconds=nanoseconds / 1e6))

    def sums(self) -> Terms:
        """What the layers of students take together, as a sum over blocks and pairs of blocks (nanoseconds)."""
        return summed(self._layers, fit_times(self._layers, self._students()))

    def correction(self, sums: Terms) -> tuple[float, float]:
        """Offset (as a fraction of the base) and slope of the line through the whole students that were measured.

        Least squares of relative errors, with a prior around none and one: a few models say little.
        """
        students = self._students()
        pairs = np.array([(total_of(sums, one.row), one.total) for one in students]) / self.whole_base
        noise = np.where([digest in self._exact for digest in sorted(self._observed)], _NOISE, _ROUGH_NOISE)
        weights = 1 / pairs[:, 1] / noise  # of the errors
        design = weights[:, None] * np.stack([np.ones(len(pairs)), pairs[:, 0]], axis=1)
        precision = design.T @ design + np.diag([_OFFSET**-2, _SLOPE**-2])
        evidence = design.T @ (weights * pairs[:, 1]) + np.array([0.0, _SLOPE**-2])
        offset, slope = np.linalg.solve(precision, evidence)
        return float(offset), max(_LEAST_SLOPE, float(slope))

    def onto(self, table: CostTable) -> CostTable:
        """A cost table with the corrected sums as its latency."""
        sums = self.sums()
        offset, slope = self.correction(sums)
        corrected = {blocks: slope * numbers for blocks, numbers in sums.items()}
        corrected[()] = corrected.get((), np.zeros(())) + offset * self.whole_base
        return table.with_measured(LATENCY, corrected)

    def _students(self) -> list[Observed]:
        """The students that were measured, in an order that does not depend on when."""
        return [student for _, student in sorted(self._observed.items())]

    def _seen(self, genotype: Genotype, measured: Measured) -> Observed:
        row, layers = row_of(self.analysis.blocks, genotype), {n: 1e6 * time for n, time in measured.layers.items()}
        return Observed(row=row, total=1e6 * measured.milliseconds, layers=layers)

    def _subject(self, genotype: Mapping[str, Choice], *, layers: bool = False) -> Subject:
        student = build_student(self.base, self.analysis, genotype)
        modules = tuple(layer.module for layer in self._layers) if layers else ()
        return Subject(module=student.eval(), arguments=(self._images,), layers=modules)


def drawn(blocks: Sequence[Block], count: int, seed: int = 0) -> list[Genotype]:
    """Random genotypes, each with mostly narrow or mostly wide blocks, and as many of each kind of convolution."""
    generator = np.random.default_rng(seed)
    levels = generator.permutation(np.linspace(0, 1, count))
    return [Genotype.of({block.name: _drawn(block, level, generator) for block in blocks}) for level in levels]


def _drawn(block: Block, level: float, generator: np.random.Generator) -> Choice:
    kinds = list(dict.fromkeys((choice.conv, choice.kernel_size, choice.keep) for choice in block.choices))
    odds = np.array([1.0 if keep else _DROPPED for _, _, keep in kinds])
    kind = kinds[generator.choice(len(kinds), p=odds / odds.sum())]
    fitting = [choice for choice in block.choices if (choice.conv, choice.kernel_size, choice.keep) == kind]
    odds = np.array([np.exp(-abs(choice.width - level) / _SPREAD) for choice in fitting])
    return fitting[generator.choice(len(fitting), p=odds / odds.sum())]


def _key(subject: Subject, timing: Timing, *, layers: bool = False) -> str:
    kind = "whole" if timing == WHOLE else "rough"
    return f"{kind}{' layers' if subject.layers or layers else ''} {structure_of(subject)}"


def structure_of(subject: Subject) -> str:
    """A digest of all that a module's latency depends on but its weights: equal for modules of the same structure that
    are called with tensors of the same shapes."""
    lines: list[Any] = [[list(tensor.shape), str(tensor.dtype)] for tensor in subject.tensors()]
    for name, module in subject.module.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        plain = sorted((key, repr(value)) for key, value in vars(module).items() if _is_plain(key, value))
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        lines.append([name.count("."), kind, plain, [[key, list(t.shape), str(t.dtype)] for key, t in own]])
    return digest_of(json.dumps(lines), 24)


def _is_plain(name: str, value: object) -> bool:
    if name.startswith("_") or name == "training":
        return False
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float | str | bool) for item in value)
    return value is None or isinstance(value, int | float | str | bool)


def latencies_key(spec: LatencySpec) -> str:
    """Names the file of measurements: of this specification, machine and versions."""
    return digest_of(json.dumps(["2", spec.facts()], sort_keys=True))
