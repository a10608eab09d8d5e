from __future__ import annotations

import pytest
import torch
from torch import nn

from nas_kd.errors import TrainingError
from nas_kd.training.recipe import Recipe


def test_one_cycle_rises_and_falls() -> None:
    recipe = Recipe(epochs=1, lr=0.1)
    rates = [recipe.learning_rate(step, 100) for step in range(100)]
    assert max(rates) == rates[30] == pytest.approx(0.1)
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert 0 < rates[0] < 0.01
    assert 0 < rates[-1] < 0.001


@pytest.mark.parametrize(("schedule", "first", "last"), [("cosine", 0.1, 0.0), ("constant", 0.1, 0.1)])
def test_other_schedules(schedule: str, first: float, last: float) -> None:
    recipe = Recipe(epochs=1, lr=0.1, schedule=schedule)
    assert recipe.learning_rate(0, 1000) == pytest.approx(first)
    assert recipe.learning_rate(999, 1000) == pytest.approx(last, abs=1e-5)


def test_steps_fall_at_a_half_and_at_three_quarters() -> None:
    recipe = Recipe(epochs=300, lr=0.1, schedule="step")  # 150 and 225 of 300
    rates = [recipe.learning_rate(step, 300) for step in (0, 149, 150, 224, 225, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_schedules_have_a_positive_rate(steps: int) -> None:
    assert all(Recipe(epochs=1).learning_rate(step, steps) > 0 for step in range(steps))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_norms_and_biases_do_not_decay(name: str, kind: type) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = Recipe(epochs=1, optimizer=name, weight_decay=0.1).make_optimizer(list(network.parameters()))
    assert isinstance(optimizer, kind)
    decays = {len(group["params"]): group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {1: 0.1, 3: 0.0}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("batch_size", 1, "batch_size must be at least 2"),
        ("lr", 0.0, "lr must be positive, got 0.0"),
        ("lr", float("nan"), "lr must be positive, got nan"),
        ("momentum", 1.0, r"momentum must be in \[0, 1\)"),
        ("distill_weight", 1.5, r"distill_weight must be in \[0, 1\], got 1.5"),
        ("temperature", 0.0, "temperature must be positive"),
        ("ema", 1.0, r"ema must be in \[0, 1\)"),
        ("eval_epochs", (0,), "eval_epochs must be in 1–4"),
        ("eval_epochs", (5,), "eval_epochs must be in 1–4"),
        ("optimizer", "adam", "unknown optimizer 'adam': use sgd or adamw; did you mean 'adamw'"),
        ("schedule", "onecycle", "did you mean 'one-cycle'"),
        ("distill", "dk", "unknown distill 'dk': use kd or dkd"),
        ("dkd_beta", -1.0, "dkd_beta must be 0 or more, got -1.0"),
    ],
)
def test_bad_values_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Recipe(**{"epochs": 4, field: value})  # type: ignore[arg-type]
