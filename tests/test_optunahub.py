"""The sampler as a package of OptunaHub: within its bounds, better than chance, and without torch."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

FOLDER = Path(__file__).parent.parent / "optunahub" / "package" / "samplers" / "knapsack"
SIZES = (4, 3, 5, 2, 4, 3, 4, 5)


def load() -> ModuleType:
    """As `optunahub.load_local_module` does."""
    name = "knapsack_package"
    spec = importlib.util.spec_from_file_location(
        name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class Problem:
    """Parameters whose values cost and are worth random amounts, dear ones more."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.space = {f"p{i}": CategoricalDistribution(list("abcde"[:size])) for i, size in enumerate(SIZES)}
        self.cost = {name: np.sort(draw.uniform(1, 10, len(own.choices))) for name, own in self.space.items()}
        self.weight = {name: draw.uniform(1, 3, len(own.choices)) for name, own in self.space.items()}
        self.worth = {name: np.sqrt(cost) + draw.normal(0, 0.5, len(cost)) for name, cost in self.cost.items()}
        self.bounds = {"cost": 38.0, "weight": 16.0}
        self.noise = draw

    def total(self, table: dict[str, Any], params: dict[str, Any]) -> float:
        return float(sum(table[name][own.choices.index(params[name])] for name, own in self.space.items()))

    def sampler(self, **given: Any) -> optuna.samplers.BaseSampler:
        costs = {"cost": self.cost, "weight": self.weight}
        sampler: optuna.samplers.BaseSampler = load().KnapsackSampler(self.space, costs, self.bounds, **given)
        return sampler

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        return {name: trial.suggest_categorical(name, own.choices) for name, own in self.space.items()}

    def run(self, sampler: optuna.samplers.BaseSampler, directions: list[str], trials: int = 16) -> optuna.Study:
        def objective(trial: optuna.Trial) -> Any:
            params = self.suggest(trial)
            sign = 1 if directions[0] == "maximize" else -1
            score = sign * (self.total(self.worth, params) + self.noise.normal(0, 0.05))
            return (score, self.total(self.cost, params))[: len(directions)]

        study = optuna.create_study(directions=directions, sampler=sampler)
        study.optimize(objective, n_trials=trials)
        return study


@pytest.mark.parametrize("directions", [["maximize"], ["minimize"], ["maximize", "minimize"]])
def test_nothing_is_over_budget_and_nothing_comes_twice(directions: list[str]) -> None:
    problem = Problem(1)
    study = problem.run(problem.sampler(seed=0), directions)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 16
    for trial in study.trials:
        assert problem.total(problem.cost, trial.params) <= 38
        assert problem.total(problem.weight, trial.params) <= 16
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 16


def test_it_finds_more_than_chance_does() -> None:
    """Chance gets as many points within the bounds: those that are over do not count."""
    gains = []
    for seed in range(2):
        problem = Problem(seed)
        study = problem.run(problem.sampler(seed=seed), ["maximize"])
        draw = np.random.default_rng(seed)
        within: list[float] = []
        while len(within) < 16:
            params = {name: draw.choice(own.choices) for name, own in problem.space.items()}
            if problem.total(problem.cost, params) <= 38 and problem.total(problem.weight, params) <= 16:
                within.append(problem.total(problem.worth, params))
        gains.append(problem.total(problem.worth, study.best_params) - max(within))
    assert min(gains) > 0


def test_with_costs_as_objectives_it_spreads_over_them() -> None:
    problem = Problem(1)
    study = problem.run(problem.sampler(seed=0), ["maximize", "minimize"])
    costs = [trial.values[1] for trial in study.best_trials]
    assert len(costs) >= 5
    assert max(costs) > 1.3 * min(costs)


def test_the_same_seed_gives_the_same_points() -> None:
    points = [[t.params for t in Problem(2).run(Problem(2).sampler(seed=5), ["maximize"], 10).trials] for _ in range(2)]
    assert points[0] == points[1]


def test_it_goes_on_when_everything_is_known() -> None:
    space = {"a": CategoricalDistribution([0, 1]), "b": CategoricalDistribution(["x", "y"])}
    sampler = load().KnapsackSampler(
        space, {"cost": {"a": [1, 2], "b": [1, 2]}}, {"cost": 3}, n_startup_trials=2, seed=0
    )
    study = optuna.create_study(sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("learning rate", 0.1, 1)  # not of the knapsack
        return trial.suggest_categorical("a", [0, 1]) + len(trial.suggest_categorical("b", ["x", "y"]))

    study.optimize(objective, n_trials=6)
    assert len({(trial.params["a"], trial.params["b"]) for trial in study.trials}) == 3


@pytest.mark.parametrize(
    ("costs", "bounds", "message"),
    [
        ({"cost": {"a": [1, 2]}}, {"price": 3}, "give both of each kind"),
        ({"cost": {"a": [1]}}, {"cost": 3}, "one number for each of its values"),
        ({"cost": {"b": [1, 2]}}, {"cost": 3}, "one number for each of its values"),
        ({"cost": {"a": [4, 5]}}, {"cost": 3}, "nothing is within"),
    ],
)
def test_mistakes(costs: Any, bounds: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load().KnapsackSampler({"a": CategoricalDistribution([0, 1])}, costs, bounds)
    with pytest.raises(ValueError, match="the search space is empty"):
        load().KnapsackSampler({}, {}, {})


def test_the_example_runs_without_torch() -> None:
    """With a stand-in for the package optunahub, which would fetch what is here."""
    program = f"""
import importlib.util, runpy, sys, types
spec = importlib.util.spec_from_file_location("knapsack", {str(FOLDER / "__init__.py")!r})
module = sys.modules["knapsack"] = importlib.util.module_from_spec(spec)
module.__path__ = [{str(FOLDER)!r}]
spec.loader.exec_module(module)
sys.modules["optunahub"] = types.SimpleNamespace(load_module=lambda name: {{"samplers/knapsack": module}}[name])
runpy.run_path({str(FOLDER / "example.py")!r}, run_name="__main__")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    params = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert params == sorted(params)
    assert params[-1] <= 100_000


def test_its_front_matter_is_what_the_registry_asks_for() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    keys = re.findall(r"^(\w+):", text.split("---")[1], re.MULTILINE)
    assert keys == ["author", "title", "description", "tags", "optuna_versions", "license"]
