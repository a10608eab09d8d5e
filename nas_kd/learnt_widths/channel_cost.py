"""What a network costs by how many channels stay: exact at whole numbers and smooth between them.

`costs` writes the polynomials of `cost_terms` out by choices; here the counts of channels themselves are the
variables, so that a gradient can tell what a channel costs. Equal to the table at the counts of any genotype that
changes widths alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas_kd.analysis.labels import Labels
from nas_kd.analysis.structure import Analysis
from nas_kd.budget import KINDS
from nas_kd.costs.cost_terms import Counts, cost_polynomials
from nas_kd.genotype import Choice


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
    """Return the segments of every block that has a width, in the order of the blocks."""
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
    """Count the units of each segment that a genotype keeps (S, float64)."""
    mask = analysis.keep_mask(genotype)
    return torch.tensor([float(mask[segment.units].sum()) for segment in segments_of(analysis)], dtype=torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelCost:
    """Params and MACs of a base whose S segments keep so many units each, its convolutions left as they are.

    Term t is the product of the counts `factors[t]` (T×D; S stands for 1), taken `coefficients[:, t]` times in each of
    `KINDS`. `own` (B×S) says whose the segments are.
    """

    factors: Tensor
    coefficients: Tensor
    own: Tensor

    def to(self, device: torch.device) -> ChannelCost:
        """Return the same on `device`."""
        return ChannelCost(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def total(self, counts: Tensor) -> Tensor:
        """Return the cost of the whole network in each of `KINDS`: …×S counts → …×2."""
        padded = F.pad(counts, (0, 1), value=1.0)
        products = functools.reduce(torch.mul, (padded[..., column] for column in self.factors.T))
        return products @ self.coefficients.T

    def by_block(self, counts: Tensor) -> Tensor:
        """Return G_b (B×2): what the channels of each block cost beside those of the others, taken as they are.

        S counts; the gradient of G_b reaches the counts of block b alone, as in MorphNet (arXiv 1711.06798),
        where a layer's regulariser takes the other side's channels as constants.
        """
        others = counts.detach()
        mine = torch.where(self.own, counts, others)
        return self.total(mine) - self.total(torch.where(self.own, 0.0, others))


def channel_cost(analysis: Analysis, network: nn.Module) -> ChannelCost:
    """Return the polynomial of an analysed base. Takes a fraction of a second."""
    counts, segments = Counts(analysis), segments_of(analysis)
    polynomials = cost_polynomials(analysis, network, counts)
    of_base = {v: int(values[0]) for v, values in enumerate(counts.variables.values) if v >= len(segments)}
    costs = [polynomials[kind].fixed(of_base) for kind in KINDS]
    terms = list(dict.fromkeys(term for cost in costs for term in cost.terms))
    most = max(map(len, terms))
    return ChannelCost(
        factors=torch.tensor([(*term, *(len(segments),) * (most - len(term))) for term in terms]),
        coefficients=torch.tensor(
            [[float(cost.terms.get(term, 0)) for term in terms] for cost in costs], dtype=torch.float64
        ),
        own=torch.tensor([[s.block == index for s in segments] for index in range(len(analysis.blocks))]),
    )
