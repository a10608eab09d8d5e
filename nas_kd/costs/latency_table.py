"""Latency as a cost: measured for each choice of each block, added up, corrected by whole models.

A block's choice is measured in its frame (`nas_kd.students.frames`) beside the base's own, and what it adds or saves is
taken to be the same whatever the other blocks are. That is not so (caches, launches, fused operations), so whole models
are measured too, and a straight line through them corrects the sum. What decides is always a whole model's own latency.
Every measurement is made once and kept: decisions do not change when a study is resumed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree as pytree

from nas_kd.analysis.structure import Analysis
from nas_kd.costs.cost_table import CostTable
from nas_kd.costs.latency import Timing
from nas_kd.costs.runtimes import LatencySpec, Measure, Subject, measurer
from nas_kd.genotype import Choice, Genotype
from nas_kd.students.building import build_student
from nas_kd.students.frames import Passage, find_frames, recording, swapped

PART = Timing(warmup=2, repeats=5, tolerance=0.02, limit_s=0.5)  # of a block: its choices are many
WHOLE = Timing(warmup=3, repeats=10, tolerance=0.02, limit_s=3.0)
_TOGETHER = 8  # subjects that take turns with their reference
_OFFSET, _SLOPE, _NOISE = 0.1, 0.5, 0.03  # standard deviations, as fractions of the base: what a correction may be
_LEAST_SLOPE = 0.1


class Store(Protocol):
    """Where measurements are kept: JSON objects by key, a dict or a file of records."""

    def __contains__(self, key: str, /) -> bool: ...
    def __getitem__(self, key: str, /) -> dict[str, Any]: ...
    def __setitem__(self, key: str, record: dict[str, Any], /) -> None: ...


class Meter:
    """Measures modules as a `LatencySpec` says, each one once: what was measured is looked up in `store`.

    Modules are told apart by their structure and the shapes that go in, so equal blocks are measured once. A module is
    measured beside a reference, turn by turn, and keeps its ratio to what the reference took at first: a machine that
    is busier than then treats both alike. A user's command has no reference.
    """

    def __init__(self, spec: LatencySpec, *, store: Store | None = None, measure: Measure | None = None) -> None:
        self.spec = spec
        self.store: Store = {} if store is None else store
        self._measure = measure or measurer(spec)
        self.measured = 0  # modules that were not in the store

    def nanoseconds(
        self, reference: Subject, subjects: Iterator[Subject] | Sequence[Subject], timing: Timing
    ) -> tuple[int, list[int]]:
        """The latencies of a reference and of some subjects."""
        base = self._alone(reference, timing)
        keys, waiting = [], {}
        for subject in subjects:
            keys.append(key := _key(subject, timing))
            if key not in self.store and key not in waiting:
                waiting[key] = subject
            if len(waiting) == _TOGETHER:
                self._beside(reference, base, waiting, timing)
                waiting = {}
        self._beside(reference, base, waiting, timing)
        return base, [int(self.store[key]["ns"]) for key in keys]

    def _alone(self, reference: Subject, timing: Timing) -> int:
        key = _key(reference, timing)
        if key not in self.store:
            self._keep(key, self._measure({key: reference}, timing)[key])
        return int(self.store[key]["ns"])

    def _beside(self, reference: Subject, base: int, waiting: Mapping[str, Subject], timing: Timing) -> None:
        if not waiting:
            return
        if self.spec.command:
            times = self._measure(waiting, timing)
        else:
            times = self._measure({"reference": reference, **waiting}, timing)
            now = times.pop("reference")
            times = {key: value / now * base / 1e6 for key, value in times.items()}
        for key, value in times.items():
            self._keep(key, value)

    def _keep(self, key: str, milliseconds: float) -> None:
        self.store[key] = {"ns": max(1, round(milliseconds * 1e6))}
        self.measured += 1


class LatencyTable:
    """The latency of every student of a base as a sum, and of those that were measured as whole models.

    `measure_blocks` fills the table; `whole` measures a student; `onto` gives a cost table the corrected sums.
    """

    def __init__(self, base: nn.Module, analysis: Analysis, input_size: Sequence[int], meter: Meter) -> None:
        self.base, self.analysis, self.meter = base, analysis, meter
        device = next((tensor.device for tensor in base.parameters()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randn(meter.spec.batch, *input_size, generator=generator).to(device)
        self.whole_base = 0  # nanoseconds
        self.parts: list[NDArray[np.int64]] = []  # per block over its choices, what each adds to the base
        self._pairs: dict[str, tuple[int, int]] = {}  # by digest: the plain sum, and what the whole model took
        self._exact: dict[str, int] = {}
        self._reference = self._subject(analysis.identity)

    def measure_blocks(self, report: Callable[[str], None] = lambda words: None) -> None:
        """Measures the base and every choice of every block. Raises ModelError when something cannot be run."""
        self.whole_base = self.meter.nanoseconds(self._reference, (), WHOLE)[0]
        base = copy.deepcopy(self.base).eval()  # the user's own keeps its mode
        frames = find_frames(base, self.analysis, self._images)
        with torch.no_grad(), recording(base, frames) as passages:
            base(self._images)
        for block in self.analysis.blocks:
            frame, passage = frames[block.name], passages[block.name][0]

            def students(block: Any = block, frame: Any = frame, passage: Passage = passage) -> Iterator[Subject]:
                for choice in block.choices:
                    student = build_student(self.base, self.analysis, swapped(self.analysis, block, choice))
                    yield _inside(frame.inside(student), passage)

            own, times = self.meter.nanoseconds(_inside(frame.inside(base), passage), students(), PART)
            self.parts.append(np.array(times, dtype=np.int64) - own)
            report(block.name)

    def whole(self, genotype: Mapping[str, Choice]) -> int:
        """The latency of a whole student (nanoseconds): measured, or as it was measured before."""
        student = Genotype.of(dict(genotype))
        if student.digest not in self._exact:
            times = self.meter.nanoseconds(self._reference, [self._subject(student)], WHOLE)[1]
            self.observe(student, times[0])
        return self._exact[student.digest]

    def known(self, genotype: Genotype) -> int | None:
        """The latency of a whole student, None when it was not measured."""
        return self._exact.get(genotype.digest)

    def observe(self, genotype: Genotype, nanoseconds: int) -> None:
        """Notes what a whole student took: it corrects the sums."""
        self._exact[genotype.digest] = nanoseconds
        if self.parts:
            self._pairs[genotype.digest] = (self.sum_of(genotype), nanoseconds)

    def sum_of(self, genotype: Mapping[str, Choice]) -> int:
        """The base's latency and what each block's choice adds to it, not corrected (nanoseconds)."""
        added = (
            part[block.choices.index(genotype[block.name])]
            for part, block in zip(self.parts, self.analysis.blocks, strict=True)
        )
        return self.whole_base + int(sum(added))

    def correction(self) -> tuple[float, float]:
        """Offset (as a fraction of the base) and slope of the line through the whole models that were measured.

        Least squares of relative errors, with a prior around none and one: a few models say little.
        """
        pairs = np.array(list(self._pairs.values()), dtype=np.float64).reshape(-1, 2) / max(1, self.whole_base) - 1
        weights = 1 / (1 + pairs[:, 1:])  # of the errors, by what each took
        design = weights * np.stack([np.ones(len(pairs)), pairs[:, 0]], axis=1)
        precision = design.T @ design / _NOISE**2 + np.diag([_OFFSET**-2, _SLOPE**-2])
        evidence = design.T @ (weights[:, 0] * pairs[:, 1]) / _NOISE**2 + np.array([0.0, _SLOPE**-2])
        offset, slope = np.linalg.solve(precision, evidence)
        return float(offset), max(_LEAST_SLOPE, float(slope))

    def onto(self, table: CostTable) -> CostTable:
        """A cost table with the corrected sums as its latency."""
        offset, slope = self.correction()
        parts = [np.rint(slope * part).astype(np.int64) for part in self.parts]
        return table.with_latency(round(self.whole_base * (1 + offset)), parts)

    def _subject(self, genotype: Mapping[str, Choice]) -> Subject:
        student = build_student(self.base, self.analysis, genotype)
        return Subject(module=student.eval(), arguments=(self._images,))


def _inside(module: nn.Module, passage: Passage) -> Subject:
    arguments, keywords = pytree.tree_unflatten(list(passage.inputs), passage.structure)
    return Subject(module=module.eval(), arguments=arguments, keywords=keywords)


def _key(subject: Subject, timing: Timing) -> str:
    return f"{'whole' if timing == WHOLE else 'part'} {structure_of(subject)}"


def structure_of(subject: Subject) -> str:
    """A digest of all that a module's latency depends on but its weights: equal for modules of the same structure that
    are called with tensors of the same shapes."""
    lines: list[Any] = [[list(tensor.shape), str(tensor.dtype)] for tensor in subject.tensors()]
    for name, module in subject.module.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        plain = sorted((key, repr(value)) for key, value in vars(module).items() if _is_plain(key, value))
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        lines.append([name.count("."), kind, plain, [[key, list(t.shape), str(t.dtype)] for key, t in own]])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:24]


def _is_plain(name: str, value: object) -> bool:
    if name.startswith("_") or name == "training":
        return False
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float | str | bool) for item in value)
    return value is None or isinstance(value, int | float | str | bool)


def store_key(spec: LatencySpec) -> str:
    """Names the file of measurements: of this specification, machine and versions."""
    return hashlib.sha256(json.dumps(["1", spec.facts()], sort_keys=True).encode()).hexdigest()[:16]
