"""The safety net under the analysis: a few students are built and run, and what turns out wrong is left alone.

The labels of a trace say how many channels every tensor keeps. A network may hold such a number where no tensor
shows it (an integer in its constructor), and then a narrower one fails, or counts something else than the tables
say. Students on the meta device show it for the price of a forward pass.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from nas_kd.analysis.blocks import ASPECTS, unverified_analysis
from nas_kd.analysis.operator_hook import followed
from nas_kd.analysis.schedule import bytes_of_weights
from nas_kd.analysis.structure import ROUND_TO, Analysis
from nas_kd.analysis.trace import meta_image, without_storage
from nas_kd.budget import COUNTED, Cost
from nas_kd.costs.cost_table import CostTable, cost_table
from nas_kd.errors import ModelError
from nas_kd.genotype import Genotype
from nas_kd.students.building import build_student

N_RANDOM = 2  # students beside the narrowest one; each costs a forward pass
_logger = logging.getLogger(__name__)


def measure(network: nn.Module, input_size: Sequence[int]) -> Cost:
    """Return the cost of a built network, counted by running it on the meta device: the truth that tables must equal.

    MACs are half of what torch's own formulas (`torch.utils.flop_counter`) give; shifts, which multiply by one and zero
    alone, have none. `schedule` says what memory is alive when, and what counts as size. `input_size` is (C, H, W).
    """
    return _measured(without_storage(network).eval(), input_size)[0]


def _measured(meta: nn.Module, input_size: Sequence[int]) -> tuple[Cost, list[torch.Size]]:
    """Return the cost of a network that is on the meta device, and the shapes of its outputs."""
    run = followed(meta, meta_image(meta, input_size))
    cost = Cost(
        params=sum(parameter.numel() for parameter in meta.parameters()),
        macs=run.flops // 2,
        size=bytes_of_weights(meta),
        peak_memory=run.activations.peak(run.outputs),
    )
    return cost, [output.shape for output in run.outputs]


def analyse(
    network: nn.Module,
    input_size: Sequence[int],
    *,
    name: str = "",
    open: Collection[str] = ASPECTS,
    channel_multiple: int = ROUND_TO,
) -> Analysis:
    """Finds the blocks of a network and what each may become.

    Whatever the shape of a built student shows to be wrong is left alone.

    Args:
        network: A CNN; it is not changed.
        input_size: Its images: C, H, W.
        name: By which errors name it.
        open: Aspects of a block that may change: `width`, `kernel` (size) and `conv` (kind); also `stages`, one more
            width for each residual stream, as a block of its own named `….stream`, and `keep`, blocks around an
            identity shortcut may be dropped.
        channel_multiple: Of many channels a multiple of it stays.

    Returns:
        The blocks, with the choices of each, and how their channels hang together.

    Raises:
        ModelError: When the network cannot run at that size, has no convolution, or offers no choice.

    Example:
        >>> import timm
        >>> from nas_kd import analyse
        >>> [block.name for block in analyse(timm.create_model("test_resnet"), (3, 64, 64)).blocks]
        ['conv1', 'layer1.0', 'layer2.0', 'layer3.0', 'layer4.0']
    """
    return verified(
        unverified_analysis(network, input_size, name=name, open=open, channel_multiple=channel_multiple), network
    )


def verified(analysis: Analysis, network: nn.Module) -> Analysis:
    """Return `analysis` without the widths, kernels and kinds whose students fail or cost other than the tables say.

    Raises ModelError when nothing is left, or when students still fail.
    """
    meta = without_storage(network).eval()
    for _ in range(3):
        table = cost_table(analysis, meta)
        check = _Check(meta, analysis, table)
        if check.fault(analysis.identity):
            break  # not the choices are to blame
        failing = next((genotype for genotype in _samples(table) if check.fault(genotype)), None)
        if failing is None:
            return analysis
        analysis = _without(analysis, dict(_offences(check, failing)))
        if not analysis.blocks:
            break
    raise ModelError(f"{analysis.name} is not supported: its students do not run or cost something else than counted")


def _samples(table: CostTable) -> Iterator[Genotype]:
    """Yield the narrowest student and a few random ones; the same every time."""
    yield table.genotype([block.narrowest for block in table.blocks])
    rng = np.random.default_rng(0)
    for _ in range(N_RANDOM):
        yield table.genotype([int(rng.integers(len(block.choices))) for block in table.blocks])


class _Check:
    """Builds students of one analysis on the meta device and compares them with the tables."""

    def __init__(self, meta: nn.Module, analysis: Analysis, table: CostTable) -> None:
        self.meta, self.analysis, self.table = meta, analysis, table
        cost, self._output = _measured(meta, analysis.input_size)
        self._known = {analysis.identity: _difference(cost, table.base())}

    def fault(self, genotype: Genotype) -> str:
        """Say what is wrong with the student of `genotype`, in a few words; empty when nothing is."""
        if genotype not in self._known:
            self._known[genotype] = self._fault(genotype)
        return self._known[genotype]

    def _fault(self, genotype: Genotype) -> str:
        expected = self.table.cost(genotype)
        try:
            cost, shapes = _measured(build_student(self.meta, self.analysis, genotype), self.analysis.input_size)
        except Exception as error:  # whatever a model's own code raises at a width that it does not expect
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"a student fails: {textwrap.shorten(lines[0], 100, placeholder='…')}"
        if shapes != self._output:
            return "a student's output has another shape"
        return _difference(cost, expected)

    def alone(self, genotype: Genotype, blocks: Sequence[str]) -> Genotype:
        """Return the base with the choices of `genotype` in these blocks only."""
        return Genotype.of(
            {name: genotype[name] if name in blocks else c for name, c in self.analysis.identity.items()}
        )


def _difference(cost: Cost, expected: Cost) -> str:
    wrong = [kind for kind in COUNTED if cost[kind] != expected[kind]]
    return f"a student has other {', '.join(wrong)} than counted" if wrong else ""


# what may be at fault: the fields of a choice, and what a block no longer has once they are fixed
_ASPECTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "width": (("width",), {"channels": ()}),
    "conv": (("kernel_size", "conv"), {"sites": ()}),
    "keep": (("keep",), {}),
}


def _offences(check: _Check, genotype: Genotype) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield (block, aspect) and what is wrong with it, for everything that is at fault in `genotype`."""
    for name in _culprits(check, genotype, [n for n in genotype if genotype[n] != check.analysis.identity[n]]):
        default, choice = check.analysis.identity[name], genotype[name]
        faults = {}
        for aspect, (fields, _) in _ASPECTS.items():
            only = replace(default, **{field: getattr(choice, field) for field in fields})
            if fault := check.fault(Genotype.of({**check.analysis.identity, name: only})):
                faults[name, aspect] = fault
        if not faults:
            whole = check.fault(check.alone(genotype, [name])) or "a student fails beside others"
            faults = {(name, aspect): whole for aspect in _ASPECTS}
        yield from faults.items()


def _culprits(check: _Check, genotype: Genotype, blocks: Sequence[str]) -> list[str]:
    """Find the blocks among `blocks` whose choices are at fault: by halving."""
    if not blocks or not check.fault(check.alone(genotype, blocks)):
        return []
    if len(blocks) == 1:
        return list(blocks)
    middle = len(blocks) // 2
    found = [*_culprits(check, genotype, blocks[:middle]), *_culprits(check, genotype, blocks[middle:])]
    return found or list(blocks[middle:])  # each half is fine alone: let one of them be


def _without(analysis: Analysis, offences: Mapping[tuple[str, str], str]) -> Analysis:
    """Return `analysis` with these aspects of these blocks fixed as in the base."""
    blocks = []
    for block in analysis.blocks:
        for aspect, (fields, without) in _ASPECTS.items():
            if (block.name, aspect) in offences:
                base = [getattr(block.default, field) for field in fields]
                same = (c for c in block.choices if [getattr(c, field) for field in fields] == base)
                block = replace(block, choices=tuple(same), **without)
        if len(block.choices) > 1:
            blocks.append(block)
    reasons = [(name, f"its {aspect} stays: {fault}") for (name, aspect), fault in offences.items()]
    _logger.warning("%s: left alone because students fail: %s", analysis.name, _summary(reasons))
    return replace(analysis, blocks=tuple(blocks), left_alone=(*analysis.left_alone, *reasons))


def _summary(reasons: Sequence[tuple[str, str]]) -> str:
    """Name the blocks of each reason in one line, of many the first two."""
    blocks: dict[str, list[str]] = {}
    for name, reason in reasons:
        blocks.setdefault(reason, []).append(name)
    shown = {reason: f" and {len(names) - 2} more" if len(names) > 2 else "" for reason, names in blocks.items()}
    return "; ".join(f"{', '.join(names[:2])}{shown[reason]}: {reason}" for reason, names in blocks.items())
