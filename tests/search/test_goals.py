"""The mean of the best scores within random bounds, beside the hypervolume that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nas_kd.search.goals import Array, Box, Goals, holders, spread

SIDE = 5  # whole costs are below it


def hypervolume(scores: Array, costs: Array) -> float:
    """By brute force, of scores above 0 and whole costs: cell by cell, the best score that is no dearer."""
    cells = np.floor(every_cell(costs.shape[1]))
    best = [max((s for s, c in zip(scores, costs, strict=True) if (c <= cell).all()), default=0.0) for cell in cells]
    return float(np.mean(best))


def every_cell(dimensions: int) -> Array:
    grid = np.meshgrid(*[np.arange(SIDE) + 0.5] * dimensions, indexing="ij")
    return np.stack(grid, axis=-1).reshape(-1, dimensions)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), dimensions=st.integers(1, 3), count=st.integers(0, 6))
def test_a_gain_is_what_the_hypervolume_grows_by(seed: int, dimensions: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    scores, costs = generator.random(count + 4), generator.integers(SIDE, size=(count + 4, dimensions)).astype(float)
    bounds = every_cell(dimensions)
    goals = Goals(bounds=bounds, best=np.zeros(len(bounds))).with_points(scores[:count], costs[:count])
    assert goals.best.mean() == pytest.approx(hypervolume(scores[:count], costs[:count]))
    gains = goals.gains(scores[count:], costs[count:])
    for index, gain in enumerate(gains, start=count):
        chosen = [*range(count), index]
        grown = hypervolume(scores[chosen], costs[chosen]) - goals.best.mean()
        assert max(gain, 0.0) == pytest.approx(grown)


def test_of_genotypes_that_add_nothing_the_nearest_to_the_front_gains_the_most() -> None:
    goals = Goals(bounds=np.array([[1.0], [2.0]]), best=np.array([0.5, 0.9]))
    gains = goals.gains(np.array([0.4, 0.8, 0.8, 0.5]), np.array([[1.0], [2.0], [1.0], [3.0]]))
    assert gains[:3] == pytest.approx([-0.1, -0.1, 0.15])
    assert gains[3] == -np.inf  # within no bound


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 8))
def test_holders_are_those_without_whom_a_best_would_be_lower(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    scores, costs = generator.random(count), generator.integers(SIDE, size=(count, 2)).astype(float)
    whole = hypervolume(scores, costs)
    without = [hypervolume(np.delete(scores, i), np.delete(costs, i, axis=0)) < whole for i in range(count)]
    assert holders(every_cell(2), scores, costs).tolist() == np.flatnonzero(without).tolist()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_points_fill_the_cube_more_evenly_than_random_ones(dimensions: int) -> None:
    def gap(points: NDArray[np.float64]) -> float:
        corners = np.random.default_rng(1).random((64, dimensions))
        shares = [(points <= corner).all(axis=1).mean() for corner in corners]
        return float(np.abs(np.array(shares) - corners.prod(axis=1)).mean())

    even = spread(512, dimensions, np.full(dimensions, 0.3))
    assert ((even >= 0) & (even < 1)).all()
    assert gap(even) < gap(np.random.default_rng(0).random((512, dimensions))) / 2


def test_bounds_lie_between_least_and_most_and_alike_in_each_stretch_between_levels() -> None:
    box = Box(kinds=("params", "macs"), least=np.array([2.0, 10.0]), most=np.array([20.0, 40.0]), levels=(0.5, 1.0))
    bounds = box.bounds(400)
    assert (bounds >= box.least).all()
    assert (bounds <= box.most).all()
    assert ((bounds <= 0.5 * box.most).mean(axis=0) * 400).round().tolist() == pytest.approx([200, 200], abs=2)


def test_a_box_of_one_point_has_but_that_bound() -> None:
    box = Box(kinds=("params",), least=np.array([30.0]), most=np.array([20.0]))
    assert (box.bounds(5) == 20.0).all()
