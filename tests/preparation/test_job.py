"""How trials and refinement are trained, by the command line."""

from __future__ import annotations

from dataclasses import replace

import optuna
import pytest
import torch

from nas_kd.arguments.study import parse_study
from nas_kd.budget import parse_budget
from nas_kd.data.sources import open_source
from nas_kd.errors import StudyError
from nas_kd.preparation.effort import training_images
from nas_kd.preparation.job import choices_made, proxy_recipe_of, recipe_of, training_device
from nas_kd.search.storage import CONFIG, check_study


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


def test_the_plan_counts_the_images_that_are_left_to_train_on() -> None:
    """Of 1,797 digits a fifth is cut off to test on, and a fifth of the rest to select on."""
    settings = parse_study(["--budget", "params=1M"])
    assert training_images(open_source("digits", None), settings.data) == 1150
    assert training_images(open_source("digits", None), replace(settings.data, train_images=100)) == 100


def test_a_study_that_bounded_peak_memory_by_an_earlier_rule_does_not_go_on() -> None:
    settings = parse_study(["--budget", "params=1M,peak_memory=1M", "--proxy-epochs", "1"])
    now = choices_made(settings, parse_budget(settings.search.budget))
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(study_name="old", storage=storage)
    study.set_user_attr(CONFIG, {key: value for key, value in now.items() if key != "peak memory"})
    with pytest.raises(StudyError, match=r"begun with peak memory None, not 'as deployed .*; choose another"):
        check_study(storage, "old", now)
    assert "peak memory" not in choices_made(settings, parse_budget("params=1M"))


@pytest.mark.parametrize(
    ("words", "processor", "slower"), [("--amp", "AVX2", True), ("--amp", "AVX512", False), ("", "AVX2", False)]
)
def test_mixed_precision_that_would_be_slower_is_told_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, words: str, processor: str, slower: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    training_device("cpu", amp="--amp" in words)
    assert ("no fast bfloat16" in caplog.text) == slower
