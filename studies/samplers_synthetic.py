"""Samplers on a synthetic truth over the real space of a ResNet-18 within 1 M parameters.

    python studies/samplers_synthetic.py > docs/results/samplers_synthetic.md

The truth: damages per choice that differ from the prior by a log-normal factor per block and per choice, plus random
interactions of neighbouring blocks, plus noise of 0.3 points on what a sampler sees. Every sampler has the same eight
starts. Quality is the mean, over bounds from the smallest start to 1 M, of the best true score within the bound
(chance 0.5), and the best true score; means over seeds. It decides nothing about real networks: a table of real
trainings does (issue of its own).
"""

from __future__ import annotations

import datetime
import itertools
import logging
import platform
import statistics
import time
import warnings

import numpy as np
import optuna
import timm
from numpy.typing import NDArray
from torch import nn

import nas_kd
from nas_kd.search.sampler import make_sampler
from nas_kd.search.starts import prior_damages

SEEDS, TRIALS, ASKS = 6, 40, 800


class Truth:
    """True scores of genotypes, and what a trial sees of them."""

    def __init__(self, space: nas_kd.Space[nn.Module], seed: int, interaction: float) -> None:
        self.space, self.generator = space, np.random.default_rng(seed)
        draw = self.generator.normal
        self.damages = [d * np.exp(draw(0, 0.8)) * np.exp(draw(0, 0.5, len(d))) for d in prior_damages(space.table)]
        lengths = [len(d) for d in self.damages]
        self.pairs = [draw(0, interaction, pair) for pair in itertools.pairwise(lengths)]

    def score(self, genotype: nas_kd.Genotype) -> float:
        indices: NDArray[np.int64] = self.space.table.indices(genotype)
        alone = sum(damage[i] for damage, i in zip(self.damages, indices, strict=True))
        together = sum(pair[i, j] for pair, i, j in zip(self.pairs, indices, indices[1:], strict=False))
        return float(0.95 - 0.25 * (alone + together))

    def seen(self, genotype: nas_kd.Genotype) -> float:
        return self.score(genotype) + float(self.generator.normal(0, 0.003))


def quality(points: list[tuple[int, float]], least: int) -> float:
    bounds = np.linspace(least, 1e6, 300)
    return float(np.mean([max((s for p, s in points if p <= bound), default=0.5) for bound in bounds]))


def run(space: nas_kd.Space[nn.Module], name: str, seed: int, interaction: float) -> list[float]:
    truth = Truth(space, seed, interaction)
    sampler = make_sampler(name, space, seed)
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
    space.enqueue(study)
    points: list[tuple[int, float]] = []
    started = time.perf_counter()
    asks = 0
    while len(points) < TRIALS and asks < ASKS:
        trial = study.ask()
        asks += 1
        genotype = space.suggest_genotype(trial)
        try:
            cost = space.admit(trial, genotype)
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        points.append((cost.params, truth.score(genotype)))
        study.tell(trial, (truth.seen(genotype), cost.params, cost.macs))
    least = min(params for params, _ in points[:8])
    per_ask = 1000 * (time.perf_counter() - started) / asks
    return [
        quality(points[:8], least),
        quality(points, least),
        max(s for _, s in points[:8]),
        max(s for _, s in points),
        asks,
        len(points),
        per_ask,
    ]


def main() -> None:
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(logging.ERROR)
    space = nas_kd.Space(timm.create_model("resnet18", num_classes=10, in_chans=1), budget="params=1M", img_size=16)
    print("# Samplers on a synthetic truth\n")
    print(
        f"`python studies/samplers_synthetic.py`, seeds 0–{SEEDS - 1}, {datetime.date.today()}, {platform.machine()}, "
        f"optuna {optuna.__version__}. {TRIALS} trials within budget, at most {ASKS} proposals.\n"
    )
    print("| interactions | sampler | quality: starts | all | best: starts | all | proposals | within budget | ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for interaction in (0.0, 0.03):
        for name in ("random", "tpe", "nsgaii", "knapsack"):
            columns = zip(*(run(space, name, seed, interaction) for seed in range(SEEDS)), strict=True)
            a, b, c, d, asks, within, ms = map(statistics.mean, columns)
            row = f"{a:.3f} | {b:.3f} | {c:.3f} | {d:.3f} | {asks:.0f} | {within:.0f} | {ms:.0f}"
            print(f"| {interaction} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
