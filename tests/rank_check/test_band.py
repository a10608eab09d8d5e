"""Genotypes in a band around a budget, on real spaces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from torch import nn

from nas_kd.errors import BudgetError
from nas_kd.genotype import Genotype
from nas_kd.rank_check import band
from nas_kd.rank_check.band import draw_in_band, near_optimum, share_used
from nas_kd.search.solver import solve
from nas_kd.search.space import Space
from nas_kd.search.starts import prior_damages, tightness

Within = Callable[[Space[nn.Module], str], Space[nn.Module]]


def shares(space: Space[nn.Module], genotypes: list[Genotype]) -> list[float]:
    assert space.budget is not None
    return [tightness(space.cost(genotype), space.budget, space.table.base()) for genotype in genotypes]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives up after 16,384 draws."""
    monkeypatch.setattr(band, "_CHUNKS", 4)


@pytest.mark.parametrize("budget", ["macs=50%", "params=35%", "params=50%,macs=40%", "size=40%"])
def test_every_genotype_is_in_the_band_and_another_one(space: Space[nn.Module], within: Within, budget: str) -> None:
    limited = within(space, budget)
    assert limited.budget is not None
    drawn = draw_in_band(limited.table, limited.budget, 0.15, 20, seed=0)
    assert len(set(drawn)) == 20
    assert all(0.85 <= share <= 1.15 for share in shares(limited, drawn))
    rows = np.stack([limited.table.indices(genotype) for genotype in drawn])
    assert share_used(limited.table, limited.budget, rows).tolist() == shares(limited, drawn)


def test_a_larger_draw_begins_with_the_smaller_one(resnet: Space[nn.Module], within: Within) -> None:
    limited = within(resnet, "params=1M")
    assert limited.budget is not None
    drawn = draw_in_band(limited.table, limited.budget, 0.1, 30, seed=1)
    assert draw_in_band(limited.table, limited.budget, 0.1, 5, seed=1) == drawn[:5]
    assert draw_in_band(limited.table, limited.budget, 0.1, 5, seed=2) != drawn[:5]


def test_the_band_is_filled_by_different_mixtures(resnet: Space[nn.Module], within: Within) -> None:
    limited = within(resnet, "params=1M")
    assert limited.budget is not None
    drawn = draw_in_band(limited.table, limited.budget, 0.15, 30, seed=0)
    for conv in ("standard", "depthwise", "blueprint", "group4", "shift"):
        per_genotype = [sum(choice.conv == conv for choice in genotype.values()) for genotype in drawn]
        assert 0 in per_genotype
        assert max(per_genotype) >= 2
    widths = [np.mean([choice.width for choice in genotype.values()]) for genotype in drawn]
    assert np.std(widths) > 0.1  # even draws over all choices: 0.07, and not one in 300 in the band


@pytest.mark.usefixtures("soon")
def test_an_empty_band_names_the_way_out(resnet: Space[nn.Module], within: Within) -> None:
    limited = within(resnet, "macs=1000%")
    assert limited.budget is not None
    with pytest.raises(BudgetError, match=r"gave 0 of 5 between macs=\S+ and macs=.* off\): widen --band"):
        draw_in_band(limited.table, limited.budget, 0.05, 5, seed=0)


def test_neighbours_of_the_optimum_differ_in_few_blocks(resnet: Space[nn.Module], within: Within) -> None:
    limited = within(resnet, "params=1M")
    assert limited.budget is not None
    damages = prior_damages(limited.table)
    near = near_optimum(limited.table, limited.budget, damages, band=0.15, count=12, seed=0)
    best, *others = near
    assert best == solve(limited.table, limited.budget, damages)
    assert len(set(near)) == 12
    assert all(0.85 <= share <= 1.15 for share in shares(limited, others))
    assert {sum(other[block] != best[block] for block in best) for other in others} == {1, 2, 3}
    assert near_optimum(limited.table, limited.budget, damages, band=0.15, count=12, seed=0) == near


@pytest.mark.usefixtures("soon")
def test_too_few_neighbours_are_refused(resnet: Space[nn.Module], within: Within) -> None:
    limited = within(resnet, "params=1M")
    assert limited.budget is not None
    damages = prior_damages(limited.table)
    with pytest.raises(BudgetError, match=r"only \d+ genotypes near the optimum lie in the band: widen --band"):
        near_optimum(limited.table, limited.budget, damages, band=1e-6, count=500, seed=0)
