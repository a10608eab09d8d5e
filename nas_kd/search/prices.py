"""What single blocks cost and can come to cost, and how much of a space is within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from nas_kd.analysis.structure import Analysis, Block
from nas_kd.budget import KINDS, Budget, Cost
from nas_kd.costs.cost_table import CostTable
from nas_kd.search.starts import draw_genotypes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPrices:
    """A block, and per kind of cost what its own modules cost now, and how much the whole network can save and can pay
    more when this block alone changes (its neighbours read fewer channels from it, so they save too)."""

    block: Block
    prices: Mapping[str, tuple[int, int, int]]

    def to_json(self) -> dict[str, Any]:
        """The block and its prices as plain values."""
        block = self.block
        facts: dict[str, Any] = {
            "name": block.name,
            "kind": kind_of(block),
            "width": list(block.widths) if len(block.widths) > 1 else [],
            "kernel": list(block.kernels),
            "conv": list(block.convs),
        }
        for kind, (now, saves, adds) in self.prices.items():
            facts[kind] = {"now": now, "saves": saves, "adds": adds}
        return facts


def kind_of(block: Block) -> str:
    """What a block mainly is, in a word or two, by the spatial convolutions that may change in it."""
    if not block.sites:
        return "width only"
    return "depthwise" if all(site.spec.channelwise for site in block.sites) else "dense"


def block_prices(table: CostTable, analysis: Analysis, base: nn.Module) -> tuple[BlockPrices, ...]:
    """The prices of every block, the others as they are in the base."""
    return tuple(
        BlockPrices(block=block, prices=_prices(table, column, _own_cost(block.name, analysis, base)))
        for column, block in enumerate(table.blocks)
    )


def _own_cost(block: str, analysis: Analysis, base: nn.Module) -> Cost:
    """What the modules of a block cost in the base."""

    def inside(path: str) -> bool:
        return path == block or path.startswith(f"{block}.")

    params = sum(parameter.numel() for name, parameter in base.named_parameters() if inside(name))
    calls = [call for call in analysis.trace.calls if inside(call.module)]
    return Cost(params=params, macs=sum(call.factor * math.prod(map(len, call.axes)) for call in calls))


def _prices(table: CostTable, column: int, own: Cost) -> dict[str, tuple[int, int, int]]:
    choices = table.blocks[column].choices
    rows = np.tile(table.indices({block.name: block.default for block in table.blocks}), (len(choices), 1))
    rows[:, column] = np.arange(len(choices))
    totals = table.many(rows, KINDS)
    return {kind: _range(totals[kind], own[kind]) for kind in KINDS}


def _range(totals: np.ndarray[Any, np.dtype[np.int64]], now: int) -> tuple[int, int, int]:
    changes = totals - totals[0]
    return now, -int(changes.min()), int(changes.max())


def share_within(table: CostTable, budget: Budget, draws: int, seed: int = 0) -> float:
    """The share of random genotypes within a budget, estimated from `draws` of them."""
    return float(draw_genotypes(table, budget, seed, draws)[1].mean())
