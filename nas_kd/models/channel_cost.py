"""What a network costs by how many channels stay: a polynomial, exact at whole numbers and smooth between them.

`costs` prices choices by tables; here the counts themselves are the variables, so that a gradient can tell what a
channel costs. Equal to the table at the counts of any genotype that changes widths alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nas_kd.budget import KINDS
from nas_kd.genotype import Choice
from nas_kd.models.labels import Axes, Labels
from nas_kd.models.structure import Analysis

_ONE = np.zeros(0, dtype=np.int64)  # stands for a dimension of length 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Units of one block that are narrowed alike (one segment of one of its `Channels`): their labels, the position of
    the block, and the fewest and the most of them that its open widths keep."""

    block: int
    units: Labels
    producers: tuple[str, ...]
    least: int
    most: int


def segments_of(analysis: Analysis) -> tuple[Segment, ...]:
    """The segments of every block that has a width, in the order of the blocks."""
    return tuple(
        Segment(
            block=index,
            units=units,
            producers=channels.producers,
            least=min(channels.kept(width)[position] for width in block.widths),
            most=max(channels.kept(width)[position] for width in block.widths),
        )
        for index, block in enumerate(analysis.blocks)
        for channels in block.channels
        for position, units in enumerate(channels.segments)
    )


def kept_counts(analysis: Analysis, genotype: Mapping[str, Choice]) -> Tensor:
    """How many units of each segment a genotype keeps (S, float64)."""
    mask = analysis.keep_mask(genotype)
    return torch.tensor([float(mask[segment.units].sum()) for segment in segments_of(analysis)], dtype=torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelCost:
    """Params and MACs of a base whose segments keep so many units each, its convolutions left as they are.

    The length of dimension a is `lengths[a, 0] + lengths[a, 1:] @ counts`; term t is the product of the lengths
    `axes[t]`, counted `factors[:, t]` times in each of `KINDS`. `own` (B×S) says whose the segments are.
    """

    lengths: Tensor
    axes: Tensor
    factors: Tensor
    own: Tensor

    def to(self, device: torch.device) -> ChannelCost:
        """The same on `device`."""
        return ChannelCost(
            lengths=self.lengths.to(device),
            axes=self.axes.to(device),
            factors=self.factors.to(device),
            own=self.own.to(device),
        )

    def total(self, counts: Tensor) -> Tensor:
        """…×S counts → …×2, the cost of the whole network in each of `KINDS`."""
        lengths = counts @ self.lengths[:, 1:].T + self.lengths[:, 0]
        first, *others = self.axes.T
        products = lengths[..., first]
        for column in others:
            products = products * lengths[..., column]
        return products @ self.factors.T

    def by_block(self, counts: Tensor) -> Tensor:
        """G_b (B×2): what the channels of each block cost beside those of the others, which are taken as they are.

        S counts; the gradient of G_b reaches the counts of block b alone, as in MorphNet (arXiv 1711.06798),
        where a layer's regulariser takes the other side's channels as constants.
        """
        others = counts.detach()
        mine = torch.where(self.own, counts, others)
        return self.total(mine) - self.total(torch.where(self.own, 0.0, others))


def channel_cost(analysis: Analysis, network: nn.Module) -> ChannelCost:
    """The polynomial of an analysed base; a fraction of a second."""
    segments = segments_of(analysis)
    owner = np.full(analysis.labels, len(segments), dtype=np.int64)  # of each label its segment; the last is none
    for number, segment in enumerate(segments):
        owner[segment.units] = number
    positions: dict[bytes, int] = {}
    rows: list[list[float]] = []

    def position(labels: Labels) -> int:
        key = labels.tobytes()
        if key not in positions:
            positions[key] = len(rows)
            rows.append(_length(labels, owner, segments))
        return positions[key]

    terms: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0] * len(KINDS))
    for kind, factor, axes in _products(analysis, network):
        terms[tuple(sorted(map(position, axes)))][KINDS.index(kind)] += factor
    most = max(map(len, terms))
    padded = [(*term, *(position(_ONE),) * (most - len(term))) for term in terms]
    own = torch.tensor([[s.block == index for s in segments] for index in range(len(analysis.blocks))])
    return ChannelCost(
        lengths=torch.tensor(rows, dtype=torch.float64),
        axes=torch.tensor(padded),
        factors=torch.tensor(list(terms.values()), dtype=torch.float64).T.contiguous(),
        own=own,
    )


def _length(labels: Labels, owner: Labels, segments: tuple[Segment, ...]) -> list[float]:
    """A dimension's length as a constant and a number for each unit of a segment that stays."""
    if not len(labels):
        return [1.0, *(0.0 for _ in segments)]
    *held, constant = np.bincount(owner[labels], minlength=len(segments) + 1).tolist()
    return [float(constant), *(count / len(s.units) for count, s in zip(held, segments, strict=True))]


def _products(analysis: Analysis, network: nn.Module) -> Iterator[tuple[str, float, tuple[Labels, ...]]]:
    """Every tensor of params and every call with its MACs: a factor, and the dimensions that have labels."""
    params, macs = KINDS
    for name, parameter in network.named_parameters():
        axes: Axes = analysis.trace.axes.get(name, (None,) * parameter.ndim)
        plain = [length for length, labels in zip(parameter.shape, axes, strict=True) if labels is None]
        yield params, float(np.prod(plain)), tuple(labels for labels in axes if labels is not None)
    for call in analysis.trace.calls:
        yield macs, float(call.factor), call.axes
