"""How long each layer of a student takes, learnt from students that were timed layer by layer.

A layer's time is a sum of four amounts: one, the channels that it reads, those that it writes, and their product. What
each amounts to is fitted for each kind of layer (its convolution, its kernel, the size of its maps), near what a few
numbers that all kinds share make of it: what an operator, a MAC, an element that is read or written takes. So the
time of a student is a sum over blocks and pairs of blocks, as its MACs are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from nas_kd.analysis.labels import Call
from nas_kd.analysis.structure import Analysis, Site
from nas_kd.costs.cost_terms import Counts
from nas_kd.costs.polynomial import ByChoices, Polynomial, Vector
from nas_kd.genotype import Choice, group_count

Floats = NDArray[np.float64]
_CONV, _MATRIX = "standard", "matrix"
_ONE, _READ, _WRITTEN, _PRODUCT = range(4)  # the amounts
_SHARED = 7  # operators, depthwise MACs, dense MACs, 1×1 MACs, elements read, elements written, weights
_NOISE, _AWAY = 0.05, 0.5  # as shares of a layer's time: how it scatters, how far a kind's amounts are from the shared
_FLOOR = 0.2  # of the mean time of a layer: shorter ones need not be as exact


@dataclass(frozen=True, slots=True)
class Kind:
    """What a layer is, its channels apart: layers of one kind with as many channels take the same time."""

    conv: str
    kernel: int
    read: int  # positions
    written: int
    groups: int = 1
    channelwise: bool = False

    def shared(self) -> Floats:
        """What the shared numbers make of the four amounts (4 × `_SHARED`)."""
        taps, read, written = self.kernel**2, self.read, self.written
        spatial = [1, taps * written, 0, 0, read, written, taps]  # depthwise, by channel
        dense = [0, 0, taps * written / self.groups, 0, 0, 0, taps / self.groups]
        point = [0, 0, 0, written, 0, 0, 1]
        rows = np.zeros((4, _SHARED))
        rows[_ONE, 0] = 1 if self.channelwise or self.conv in (_CONV, _MATRIX) else 2
        if self.channelwise:
            rows[_READ, 1:] = spatial[1:]
        elif self.conv in (_CONV, _MATRIX):
            rows[_READ, 4], rows[_WRITTEN, 5] = read, written
            rows[_PRODUCT] = point if taps == 1 and self.groups == 1 else dense
        elif self.conv == "blueprint":
            rows[_READ, 4], rows[_WRITTEN, 1:] = read, [spatial[1], 0, 0, read, read + written, taps]
            rows[_PRODUCT] = [0, 0, 0, read, 0, 0, 1]
        else:  # a spatial one, then the 1×1
            rows[_READ, 1:] = [spatial[1] * (self.groups == 1), 0, 0, read + written, written, taps]
            rows[_WRITTEN, 5] = written
            rows[_PRODUCT] = np.add(point, dense if self.groups > 1 else 0)
        return rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """A call of the base: its module, the block that chooses its kind, if one does, and its kind by that block's
    choices; what it reads, writes and multiplies by the choices of blocks; `stays` says by the choices of the block
    `around` it whether it is there."""

    module: str
    block: int | None
    kinds: tuple[Kind, ...]
    amounts: tuple[ByChoices, ...]  # what is read, written, and their product
    around: int | None
    stays: NDArray[np.bool_]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that it depends on."""
        factors = (factors for amount in self.amounts for factors in amount.factors())
        named = {block for block in (self.block, self.around) if block is not None}
        return tuple(sorted(named.union(*factors)))

    def kind(self, row: Vector) -> Kind:
        """Its kind in a student with these positions of choices."""
        return self.kinds[0 if self.block is None else int(row[self.block])]

    def is_in(self, row: Vector) -> bool:
        """Whether a student has it."""
        return self.around is None or bool(self.stays[row[self.around]])


def layers_of(analysis: Analysis) -> list[Layer]:
    """The layers of an analysed base, in the order in which they run."""
    counts = Counts(analysis)
    sites = {site.module: (index, site) for index, block in enumerate(analysis.blocks) for site in block.sites}
    found: dict[str, Layer] = {}
    for call in analysis.trace.calls:
        if call.module in found:
            continue
        index, site = sites.get(call.module, (None, None))
        if index is not None and site is not None:
            choices = analysis.blocks[index].choices
            kinds = tuple(_chosen(site, choice) for choice in choices)
            inputs, outputs = counts.count(site.inputs), counts.count(site.outputs)
        else:
            kinds = (_own(call, analysis),)
            nothing: Polynomial[int] = Polynomial()
            inputs = nothing if call.inputs is None else counts.count(call.inputs)
            outputs = nothing if call.outputs is None else counts.count(call.outputs)
        product = counts.product(call.axes) if call.inputs is None or call.outputs is None else inputs * outputs
        found[call.module] = Layer(
            module=call.module,
            block=index,
            kinds=kinds,
            amounts=tuple(counts.variables.by_choices(amount) for amount in (inputs, outputs, product)),
            around=(around := counts.around(call.module)),
            stays=np.array([] if around is None else [choice.keep for choice in analysis.blocks[around].choices]),
        )
    return list(found.values())


def _chosen(site: Site, choice: Choice) -> Kind:
    channelwise = site.spec.channelwise
    conv = "depthwise" if channelwise else choice.conv or _CONV
    return Kind(
        conv,
        choice.kernel_size or site.spec.kernel_size,
        *site.positions,
        groups=group_count(conv) or 1,
        channelwise=channelwise,
    )


def _own(call: Call, analysis: Analysis) -> Kind:
    """The kind of a call that no block chooses."""
    flow = analysis.trace.flows.get(call.module)
    read, written = (1, 1) if flow is None else (_positions(flow.in_shape), _positions(flow.out_shape))
    if call.inputs is None or call.outputs is None:
        return Kind(_MATRIX, 1, call.factor, call.factor)
    groups = call.groups
    channelwise = groups > 1 and groups == len(call.inputs)
    per_output = call.factor * math.prod(map(len, call.axes)) / max(1, len(call.outputs) * written)
    taps = per_output / (len(call.inputs) / groups)
    kernel = max(1, round(math.sqrt(taps)))
    return Kind(_CONV, kernel, read, written, groups=groups, channelwise=channelwise)


def _positions(shape: tuple[int, ...]) -> int:
    return math.prod(shape[2:]) if len(shape) == 4 else math.prod(shape[1:-1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """A student that was timed: the positions of its choices, the nanoseconds of all of it and, where the runtime told,
    of each layer by its module."""

    row: Vector
    total: float
    layers: Mapping[str, float] = field(default_factory=dict)


Times = Mapping[Kind, Floats]  # nanoseconds that each of the four amounts takes


def fit_times(layers: Sequence[Layer], students: Sequence[Observed]) -> Times:
    """What explains the times of these students best."""
    rows = np.stack([student.row for student in students])
    amounts = [_amounts(layer, rows) for layer in layers]
    seen: dict[Kind, list[tuple[Floats, float]]] = {kind: [] for layer in layers for kind in layer.kinds}
    shared = {kind: kind.shared() for kind in seen}
    wholes = []
    for number, student in enumerate(students):
        explained = np.zeros(_SHARED)
        for layer, amount in zip(layers, amounts, strict=True):
            if layer.is_in(student.row):
                kind = layer.kind(student.row)
                explained += amount[number] @ shared[kind]
                if student.layers:
                    seen[kind].append((amount[number], student.layers.get(layer.module, 0.0)))
        wholes.append((explained, student.total))
    parts = [(amount @ shared[kind], time) for kind, pairs in seen.items() for amount, time in pairs]
    numbers = _non_negative(parts or wholes)
    floor = _FLOOR * float(np.mean([time for _, time in parts])) if parts else 0.0
    return {kind: _near(shared[kind] @ numbers, pairs, floor) for kind, pairs in seen.items()}


def _amounts(layer: Layer, rows: Vector) -> Floats:
    """One, and what a layer reads, writes and multiplies, in each of N students (N × 4)."""
    return np.stack([np.ones(len(rows)), *(amount.at(rows) for amount in layer.amounts)], axis=1).astype(np.float64)


def expected(layer: Layer, times: Times, rows: Vector) -> Floats:
    """The time of a layer in each of N students, none where it is not there."""
    spent = np.stack([times[kind] for kind in layer.kinds])
    kinds = np.zeros(len(rows), dtype=np.int64) if layer.block is None else rows[:, layer.block]
    taken = (_amounts(layer, rows) * spent[kinds]).sum(axis=1)
    return taken if layer.around is None else np.asarray(taken * layer.stays[rows[:, layer.around]])


def _non_negative(examples: Sequence[tuple[Floats, float]]) -> Floats:
    """Least squares of relative errors, no number below none."""
    design, times = np.stack([one for one, _ in examples]), np.array([time for _, time in examples])
    weights = 1 / (times + _FLOOR * times.mean())
    scale = np.maximum(np.abs(design * weights[:, None]).max(axis=0), 1e-12)  # counts of very different sizes
    return np.asarray(nnls(design * weights[:, None] / scale, times * weights)[0] / scale, dtype=np.float64)


def _near(prior: Floats, pairs: Sequence[tuple[Floats, float]], floor: float) -> Floats:
    """What the four amounts take in layers of one kind: least squares of relative errors, not far from `prior`."""
    if not pairs:
        return prior
    design, times = np.stack([amount for amount, _ in pairs]), np.array([time for _, time in pairs])
    weights = 1 / (times + floor) / _NOISE
    typical = np.maximum(times.mean() + floor, 1e-9) / np.maximum(np.abs(design).mean(axis=0), 1e-9)
    weighted = design * weights[:, None]
    precision = weighted.T @ weighted + np.diag((_AWAY * typical) ** -2.0)
    return np.asarray(prior + np.linalg.solve(precision, weighted.T @ (weights * (times - design @ prior))))


Terms = Mapping[tuple[int, ...], Floats]  # by blocks: none, one or two; nanoseconds over their choices


def summed(layers: Sequence[Layer], times: Times) -> Terms:
    """The time of a student as a sum over blocks and pairs of blocks."""
    total: dict[tuple[int, ...], Floats] = {}
    for layer in layers:
        spent = np.stack([times[kind] for kind in layer.kinds])  # choices (or one) × 4
        terms: list[tuple[Mapping[int, Vector], float, int]] = [({}, 1.0, _ONE)]
        for index, amount in enumerate(layer.amounts, _READ):
            terms += [({}, float(amount.constant), index), *((factors, 1.0, index) for factors in amount.factors())]
        for factors, constant, index in terms:
            by_block: dict[int, Floats] = {block: vector.astype(np.float64) for block, vector in factors.items()}
            if layer.block is not None:
                by_block[layer.block] = spent[:, index] * by_block.get(layer.block, np.ones(1))
            if layer.around is not None:
                by_block[layer.around] = layer.stays * by_block.get(layer.around, np.ones(1))
            value = np.array(constant if layer.block is not None else constant * spent[0, index])
            for _, vector in sorted(by_block.items()):
                value = np.multiply.outer(value, vector)
            key = tuple(sorted(by_block))
            total[key] = total.get(key, np.zeros(())) + value
    return total


def total_of(terms: Terms, row: Vector) -> float:
    """The nanoseconds of a student with these positions of choices."""
    return sum(float(numbers[tuple(row[block] for block in blocks)]) for blocks, numbers in terms.items())
