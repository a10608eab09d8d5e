"""Genotypes to begin a search with: a random one is seldom within the budget (ResNet-18 in 1 M: once in 300)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from nas_kd.budget import KINDS, Budget, Cost
from nas_kd.genotype import CONV_KINDS, Choice, Genotype
from nas_kd.models.blocks import WIDTHS, Block
from nas_kd.models.costs import CostTable


def uniform_genotype(blocks: Iterable[Block], width: float, conv: str) -> Genotype:
    """Every block at the same width and kind; where a block does not offer it, the nearest below or its default."""
    return Genotype.of({block.name: _uniform_choice(block, width, conv) for block in blocks})


def _uniform_choice(block: Block, width: float, conv: str) -> Choice:
    narrower = [offered for offered in block.widths if offered <= width]
    chosen = max(narrower) if narrower else min(block.widths)
    fitting = [choice for choice in block.choices if choice.width == chosen]
    own = [choice for choice in fitting if choice.kernel_size == block.default.kernel_size] or fitting
    return next((choice for choice in own if choice.conv == conv), own[0])


def uniform_ladder(table: CostTable) -> dict[Genotype, Cost]:
    """Uniform genotypes of every width and kind, and the cheapest ones, with their costs."""
    kinds = dict.fromkeys((*CONV_KINDS, *(conv for block in table.blocks for conv in block.convs)))
    rungs = [uniform_genotype(table.blocks, *pair) for pair in itertools.product(WIDTHS, kinds)]
    rungs += [table.cheapest(kind) for kind in KINDS]
    return {genotype: table.cost(genotype) for genotype in dict.fromkeys(rungs)}


def tightness(cost: Cost, budget: Budget | None, base: Cost) -> float:
    """The largest share of a bound that a cost uses (of the base, without a budget); ≤ 1 is within."""
    limits = {kind: base[kind] for kind in KINDS} if budget is None else dict(budget)
    return max(cost[kind] / limit for kind, limit in limits.items())


def feasible_starts(table: CostTable, budget: Budget | None, count: int) -> list[Genotype]:
    """Up to `count` uniform genotypes within the budget, evenly from the cheapest to the dearest."""
    ladder = {g: tightness(cost, budget, table.base()) for g, cost in uniform_ladder(table).items()}
    within = sorted((g for g, share in ladder.items() if share <= 1), key=lambda g: ladder[g])
    if len(within) <= count:
        return within
    return [within[index] for index in np.linspace(0, len(within) - 1, count).round().astype(int)]


def uniform_width_student(table: CostTable, budget: Budget) -> Genotype | None:
    """The widest genotype within the budget that has one width and the base's own convolutions everywhere."""
    for width in WIDTHS:
        genotype = Genotype.of(
            {block.name: _uniform_choice(block, width, block.default.conv or "standard") for block in table.blocks}
        )
        if budget.admits(table.cost(genotype)):
            return genotype
    return None


def random_genotype(table: CostTable, budget: Budget, seed: int, draws: int = 200_000) -> Genotype | None:
    """A genotype drawn evenly from the part of the space within the budget; None when no draw was within it."""
    generator = np.random.default_rng(seed)
    rows = np.stack([generator.integers(len(block.choices), size=draws) for block in table.blocks], axis=1)
    costs = table.many(rows)
    within = np.all([costs[kind] <= bound for kind, bound in budget.items()], axis=0)
    return table.genotype(rows[np.flatnonzero(within)[0]]) if within.any() else None
