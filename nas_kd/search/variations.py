"""Genotypes near others, as rows of positions (N × blocks): changed, crossed, and all that differ in one block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nas_kd.costs.cost_table import CostTable

Rows = NDArray[np.int64]


def vary(table: CostTable, parents: Rows, count: int, generator: np.random.Generator) -> Rows:
    """`count` genotypes with one or two blocks of a parent changed; every other one is first crossed with another
    parent, each block from either."""
    rows = parents[generator.integers(len(parents), size=count)]
    others = parents[generator.integers(len(parents), size=count)]
    crossed = (generator.random(rows.shape) < 0.5) & (np.arange(count) % 2 == 1)[:, None]
    return change(table, np.where(crossed, others, rows), generator)


def change(table: CostTable, rows: Rows, generator: np.random.Generator) -> Rows:
    """Each genotype with one or two of its blocks at a random choice."""
    changed = rows.copy()
    lengths = np.array([len(block.choices) for block in table.blocks])
    for often in (1.0, 0.5):
        chosen = np.flatnonzero(generator.random(len(rows)) < often)
        columns = generator.integers(rows.shape[1], size=len(chosen))
        changed[chosen, columns] = generator.integers(lengths[columns])
    return changed


def neighbours(table: CostTable, row: NDArray[np.int64]) -> Rows:
    """All genotypes that differ from this one in one block."""
    columns = np.concatenate([np.full(len(block.choices), index) for index, block in enumerate(table.blocks)])
    choices = np.concatenate([np.arange(len(block.choices)) for block in table.blocks])
    rows = np.tile(row, (len(columns), 1))
    rows[np.arange(len(columns)), columns] = choices
    different: Rows = rows[choices != row[columns]]
    return different
