"""How trials and refinement are trained, by the command line."""

from __future__ import annotations

import pytest

from nas_kd.arguments.study import parse_study
from nas_kd.preparation.job import proxy_recipe_of, recipe_of


@pytest.mark.parametrize(
    ("given", "trial", "refinement"),
    [
        ((), 0.002, 0.005),
        (("--lr", "0.05"), 0.02, 0.05),
        (("--proxy-lr", "0.01"), 0.01, 0.005),
        (("--proxy-lr", "0.01", "--lr", "0.05"), 0.01, 0.05),
    ],
)
def test_a_trial_is_gentler_than_the_refinement(given: tuple[str, ...], trial: float, refinement: float) -> None:
    settings = parse_study(["--budget", "params=1M", "--proxy-epochs", "3", *given])
    proxy, refined = proxy_recipe_of(settings), recipe_of(settings, 7)
    assert (proxy.lr, refined.lr) == pytest.approx((trial, refinement))
    assert (proxy.epochs, refined.epochs) == (3, 7)
