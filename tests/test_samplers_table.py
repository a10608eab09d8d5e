"""The table of studies/samplers.py still fits the space that it was made in, and quality is the hypervolume."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def samplers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("samplers", ROOT / "studies" / "samplers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["samplers"] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_holds_every_genotype_within_its_budget(samplers: ModuleType) -> None:
    problem = samplers.load(ROOT / samplers.TABLE, ("params", "macs"))  # compares every cost with the space's
    lengths = [len(block.choices) for block in problem.space.blocks]
    rows = np.stack(np.meshgrid(*map(np.arange, lengths), indexing="ij"), axis=-1).reshape(-1, len(lengths))
    costs = problem.space.table.many(rows, problem.space.budget)
    within = np.all([costs[kind] <= bound for kind, bound in problem.space.budget.items()], axis=0)
    assert {tuple(row) for row in rows[within].tolist()} == set(problem.scores)
    assert problem.quality(list(problem.scores)) == 1
    assert 0 < problem.quality(list(problem.scores)[:9]) < 1


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_hypervolume_is_the_share_of_points_that_are_dominated(samplers: ModuleType, dimensions: int) -> None:
    generator = np.random.default_rng(0)
    points = generator.random((12, dimensions))
    throws = generator.random((20_000, dimensions))
    share = (throws[:, None] <= points[None]).all(axis=2).any(axis=1).mean()
    assert samplers.hypervolume(points) == pytest.approx(share, abs=0.015)
