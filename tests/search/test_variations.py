from __future__ import annotations

import numpy as np
from torch import nn

from nas_kd.search.space import Space
from nas_kd.search.variations import change, neighbours, vary


def test_neighbours_are_all_genotypes_that_differ_in_one_block(space: Space[nn.Module]) -> None:
    row = np.random.default_rng(0).integers([len(block.choices) for block in space.blocks])
    around = neighbours(space.table, row)
    assert len({tuple(other) for other in around.tolist()}) == sum(len(b.choices) - 1 for b in space.blocks)
    assert ((around != row).sum(axis=1) == 1).all()


def test_a_change_is_of_one_or_two_blocks_at_most_and_of_all_blocks_in_time(space: Space[nn.Module]) -> None:
    rows = np.zeros((2000, len(space.blocks)), dtype=np.int64)
    different = change(space.table, rows, np.random.default_rng(0)) != rows
    assert different.sum(axis=1).max() == 2
    assert different.any(axis=0).all()
    assert (rows == 0).all()


def test_variations_hold_the_parents_choices_but_for_one_or_two_blocks(space: Space[nn.Module]) -> None:
    generator = np.random.default_rng(0)
    parents = generator.integers([len(block.choices) for block in space.blocks], size=(3, len(space.blocks)))
    varied = vary(space.table, parents, 400, generator)
    inherited = (varied[:, None] == parents).any(axis=1)
    assert (~inherited).sum(axis=1).max() <= 2
    single = (varied[:, None] == parents).sum(axis=2).max(axis=1) >= len(space.blocks) - 2
    assert single[::2].all()  # every other one has one parent
    assert not single.all()  # the others mix two
    for column, block in enumerate(space.blocks):
        assert varied[:, column].max() < len(block.choices)
