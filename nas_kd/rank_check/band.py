"""Genotypes whose costs lie in a band around a budget: random mixtures, and the neighbours of the best known one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nas_kd.analysis.structure import Block
from nas_kd.budget import Budget, amount
from nas_kd.costs.cost_table import CostTable
from nas_kd.data.augment import derive_seed
from nas_kd.errors import BudgetError
from nas_kd.genotype import Genotype
from nas_kd.search.starts import solve_in_time

Rows = NDArray[np.int64]
_CHUNK = 4096  # draws priced at once
_CHUNKS = 60  # a quarter of a million draws, a few seconds, before giving up
_WIDTH_SLOPE = 4.0  # std of log(odds) between width 1 and width 0: from mostly narrow to mostly wide
_MOST_CHANGES = 3  # blocks in which a neighbour differs


def share_used(table: CostTable, budget: Budget, rows: Rows) -> NDArray[np.float64]:
    """For genotypes as N × blocks positions, the share of its most binding bound that each uses (N; 1 is all of it)."""
    costs = table.many(rows, budget)
    shares: NDArray[np.float64] = np.max([costs[kind] / bound for kind, bound in budget.items()], axis=0)
    return shares


def draw_in_band(table: CostTable, budget: Budget, band: float, count: int, seed: int) -> list[Genotype]:
    """`count` different random genotypes that use 1 − `band` to 1 + `band` of the budget's most binding bound.

    Each comes from random tendencies of its own towards widths, kinds of convolution, kernel sizes and keeping blocks,
    so that the band is filled by different mixtures: of draws that are even over all choices, few fall in it and those
    are alike. A larger `count` begins with the genotypes of a smaller one. Raises BudgetError when there are too few.
    """
    found: dict[bytes, Genotype] = {}
    generator = np.random.default_rng(derive_seed(seed, "band"))
    nearest = np.inf
    for _ in range(_CHUNKS):
        rows = _draw(table.blocks, generator, _CHUNK)
        shares = share_used(table, budget, rows)
        for row in rows[np.abs(shares - 1) <= band]:
            found.setdefault(row.tobytes(), table.genotype(row))
            if len(found) == count:
                return list(found.values())
        nearest = min(nearest, *np.abs(shares - 1).tolist())
    low, high = (
        ", ".join(f"{kind}={amount(kind, share * bound)}" for kind, bound in budget.items())
        for share in (1 - band, 1 + band)
    )
    closest = "" if found else f" (the closest is {nearest:.0%} off)"
    raise BudgetError(
        f"{_CHUNK * _CHUNKS:,} random genotypes gave {len(found)} of {count} between {low} and {high}{closest}: widen "
        "--band, ask for fewer --genotypes, change --budget or open more choices (--space)"
    )


def near_optimum(
    table: CostTable, budget: Budget, damages: Sequence[NDArray[np.float64]], *, band: float, count: int, seed: int
) -> list[Genotype]:
    """The genotype of least damage within the budget, and random changes of one to three of its blocks that stay in
    the band: `count` in all. Raises BudgetError when there are too few."""
    best = solve_in_time(table, budget, list(damages))
    if best is None:
        raise BudgetError(f"no genotype within {budget} was found to look around: raise the budget, or use --near 0")
    generator = np.random.default_rng(derive_seed(seed, "near"))
    found = {table.indices(best).tobytes(): best}
    for _ in range(_CHUNKS):
        if len(found) >= count:
            break
        rows = _changed(table, table.indices(best), generator, _CHUNK)
        for row in rows[np.abs(share_used(table, budget, rows) - 1) <= band]:
            if len(found) < count:
                found.setdefault(row.tobytes(), table.genotype(row))
    if len(found) < count:
        raise BudgetError(
            f"only {len(found)} genotypes near the optimum lie in the band: widen --band or ask for fewer with --near"
        )
    return list(found.values())


def _changed(table: CostTable, row: Rows, generator: np.random.Generator, draws: int) -> Rows:
    """Copies of a row with one to `_MOST_CHANGES` random positions drawn anew."""
    open_blocks = [index for index, block in enumerate(table.blocks) if len(block.choices) > 1]
    rows = np.tile(row, (draws, 1))
    for step in range(min(_MOST_CHANGES, len(open_blocks))):
        changed = np.flatnonzero(generator.random(draws) < (1.0 if step == 0 else 0.5))
        columns = generator.choice(open_blocks, size=len(changed))
        lengths = np.array([len(block.choices) for block in table.blocks])
        rows[changed, columns] = (generator.random(len(changed)) * lengths[columns]).astype(np.int64)
    return rows


def _draw(blocks: Sequence[Block], generator: np.random.Generator, draws: int) -> Rows:
    """Random genotypes, `draws` × blocks positions of choices, each with tendencies of its own."""
    tendencies = _Tendencies(blocks, generator, draws)
    columns = []
    for block in blocks:
        noise = generator.gumbel(size=(draws, len(block.choices)))  # the largest of log(odds) + noise is a fair draw
        columns.append((tendencies.log_odds(block) + noise).argmax(axis=1))
    return np.stack(columns, axis=1).astype(np.int64)


class _Tendencies:
    """For each of `draws` genotypes, how much it tends to wide blocks, each kind of convolution, each kernel size, and
    to dropping blocks."""

    def __init__(self, blocks: Sequence[Block], generator: np.random.Generator, draws: int) -> None:
        self.slope = generator.normal(scale=_WIDTH_SLOPE, size=(draws, 1))
        self.drop = np.log(generator.uniform(1e-3, 1, size=(draws, 1)))
        self.odds = {
            field: dict(
                zip(values, np.log(generator.dirichlet(np.ones(len(values)), size=draws) + 1e-9).T, strict=True)
            )
            for field, values in (("conv", _values(blocks, "conv")), ("kernel_size", _values(blocks, "kernel_size")))
        }

    def log_odds(self, block: Block) -> NDArray[np.float64]:
        """The log of the odds of each choice of a block, draws × choices, up to a constant per draw."""
        odds = self.slope * np.array([[choice.width for choice in block.choices]])
        for field, logs in self.odds.items():
            odds = odds + np.stack([logs[getattr(choice, field)] for choice in block.choices], axis=1)
        odds = odds + self.drop * np.array([[0.0 if choice.keep else 1.0 for choice in block.choices]])
        return np.asarray(odds, dtype=np.float64)


def _values(blocks: Sequence[Block], field: str) -> list[object]:
    """Every value that a field of a choice takes, in order of appearance."""

    def all_values() -> Iterator[object]:
        for block in blocks:
            for choice in block.choices:
                yield getattr(choice, field)

    return list(dict.fromkeys(all_values()))
