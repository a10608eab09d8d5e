"""Widths of ten layers within a budget of parameters: the score is what the sampler learns, the costs are known."""

from __future__ import annotations

import optuna

import optunahub

WIDTHS = (8, 16, 32, 64)
SPACE = {f"layer{i}": optuna.distributions.CategoricalDistribution(WIDTHS) for i in range(10)}
COSTS = {"params": {name: [9.0 * width * width for width in WIDTHS] for name in SPACE}}


def objective(trial: optuna.Trial) -> tuple[float, float]:
    widths = [trial.suggest_categorical(name, WIDTHS) for name in SPACE]
    score = sum((1 + i % 3) * width**0.3 for i, width in enumerate(widths))  # stands for a training
    return score, sum(9.0 * width * width for width in widths)


if __name__ == "__main__":
    KnapsackSampler = optunahub.load_module("samplers/knapsack").KnapsackSampler
    sampler = KnapsackSampler(SPACE, COSTS, bounds={"params": 100_000}, seed=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.optimize(objective, n_trials=40)
    for trial in sorted(study.best_trials, key=lambda trial: trial.values[1]):
        print(f"{trial.values[1]:8.0f} params: {trial.values[0]:.2f}")
