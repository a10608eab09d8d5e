"""What a trial costs beside its training: sampling, bookkeeping and storage, trial by trial up to the thousandth.

    python studies/bookkeeping.py > docs/results/bookkeeping.md

A worker of the command line runs the first and the last trials of a study of 1,000 on SQLite with our sampler, alone;
those between are written at once, as finished trials of random genotypes within the budget. Only what trains is
replaced: building, training and looking at a student give a made-up score at once; everything else is as in a study.
Then over-budget trials of a random sampler beside 1,000 others, the storage in memory, so that what is left is ours.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import timm
import torch
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState
from torch import nn

import nas_kd
from nas_kd.data.images import Images
from nas_kd.genotype import Genotype
from nas_kd.search.options import parse_options
from nas_kd.search.sampler import KnapsackSampler, make_sampler
from nas_kd.search.starts import draw_genotypes, prior_damages
from nas_kd.search.storage import close_storage, open_storage, open_study, sqlite_url
from nas_kd.search.trials import Objective, Proxy, count_trained, is_trained, objectives
from nas_kd.search.work import Limits, _Worker, work
from nas_kd.training.loop import TrainResult
from nas_kd.training.recipe import Recipe
from nas_kd.training.views import Views

TRIAL = 10.0  # seconds that a trial trains in the target
PARTS: dict[str, tuple[Any, str]] = {
    "proposing": (KnapsackSampler, "sample_relative"),
    "parameters into the storage": (nas_kd.Space, "suggest_genotype"),
    "cost and constraints": (nas_kd.Space, "admit"),
    "claiming the digest": (nas_kd.search.trials, "claim"),
    "rungs": (Objective, "_train"),
    "looking after others": (_Worker, "may_start"),
}


@dataclass(slots=True)
class Watch:
    """Seconds per finished trial, by the wall and of the processor, and of the parts that are timed."""

    parts: dict[str, float] = field(default_factory=dict)
    trials: list[dict[str, float]] = field(default_factory=list)
    since: tuple[float, float] = (0.0, 0.0)
    inner: float = 0.0  # seconds of parts inside the one that runs: the sampler is asked by the first suggestion

    def start(self) -> None:
        self.parts, self.inner, self.since = {}, 0.0, (time.perf_counter(), time.process_time())

    def tick(self, trial: FrozenTrial) -> None:
        wall, own = time.perf_counter() - self.since[0], time.process_time() - self.since[1]
        trained = {"trained": float(is_trained(trial))}
        self.trials.append({**self.parts, "all, wall": wall, "all, CPU": own, **trained})
        self.start()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started, before = time.process_time(), self.inner
            self.inner = 0.0
            try:
                return function(*arguments, **options)
            finally:
                spent = time.process_time() - started
                self.parts[name] = self.parts.get(name, 0.0) + spent - self.inner
                self.inner = before + spent

        return run


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Times the parts of every trial inside the block."""
    watch = Watch()
    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, attribute, watch.timed(name, getattr(owner, attribute))))
        watch.start()
        yield watch


class Instant(Proxy):
    """A proxy whose students need no preparation."""

    def prepare(self, student: nn.Module) -> nn.Module:
        return student


def instantly(space: nas_kd.Space[nn.Module]) -> contextlib.ExitStack:
    """Inside the block students are empty and trained at once, to a score that falls with the prior's damages."""
    damages, current = prior_damages(space.table), [0.0]

    def student(self: object, genotype: Genotype) -> nn.Module:
        current[0] = sum(float(d[i]) for d, i in zip(damages, space.table.indices(genotype), strict=True))
        return nn.Identity()

    def fit(task: object, views: object, recipe: Recipe, *, report: Any, run: object) -> TrainResult:
        noise = float(np.random.default_rng(round(1e6 * current[0])).normal(0, 0.003))
        score = 0.95 - 0.1 * current[0] + noise
        for epoch in recipe.eval_epochs:
            report(epoch, score - 0.05 / epoch)
        return TrainResult(accuracies=((recipe.epochs, score),), losses=(), images=0, seconds=0.0)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(nas_kd.Space, "student", student))
    stack.enter_context(mock.patch("nas_kd.search.trials.fit", fit))
    return stack


def study_of(space: nas_kd.Space[nn.Module], storage: BaseStorage, sampler: str) -> optuna.Study:
    directions = list(objectives(space.budget).values())
    return open_study(storage, "s", directions=directions, config={}, sampler=make_sampler(sampler, space, 0))


def objective_of(space: nas_kd.Space[nn.Module]) -> Objective:
    images = Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.long), (0.5,), (0.5,))
    views = Views(images.pixels[None], images.labels, None, images.mean, images.std)
    return Objective(space, Instant(views=views, val=images, recipe=Recipe(epochs=4)))


def run(study: optuna.Study, space: nas_kd.Space[nn.Module], limits: Limits) -> list[dict[str, float]]:
    """The trials of one worker, each timed."""
    with instantly(space), watching() as watch:
        work(study, objective_of(space), limits, watch.tick)
    return watch.trials


def fill(study: optuna.Study, space: nas_kd.Space[nn.Module], count: int) -> None:
    """Adds finished trials of random genotypes until there are `count`, each with all that a trained one notes."""
    assert space.budget is not None
    rows, within = draw_genotypes(space.table, space.budget, seed=1, draws=100 * count)
    missing = count - len(study.get_trials(deepcopy=False))
    damages = prior_damages(space.table)
    pattern = next(t for t in study.get_trials() if t.state == TrialState.COMPLETE)
    for row in rows[np.flatnonzero(within)[:missing]]:
        genotype = space.table.genotype(row)
        cost = space.cost(genotype)
        damage = sum(float(d[i]) for d, i in zip(damages, row, strict=True))
        noted = {"genotype": genotype.to_json(), "digest": genotype.digest, "params": cost.params, "macs": cost.macs}
        pattern.params, pattern.user_attrs = space.point(genotype), {**pattern.user_attrs, **noted}
        pattern.values = [0.95 - 0.1 * damage, float(cost.params), float(cost.macs)]
        study.add_trial(pattern)


def ms(trials: list[dict[str, float]], part: str) -> float:
    return 1000 * statistics.median(trial.get(part, 0.0) for trial in trials)


def table(windows: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Medians over the trained trials of each window."""
    trained = {name: [trial for trial in trials if trial["trained"]] for name, trials in windows.items()}
    yield f"| ms | {' | '.join(f'{name} ({len(trials)} trained)' for name, trials in trained.items())} |"
    yield f"|---|{'---|' * len(windows)}"
    for part in (*PARTS, "all, CPU", "all, wall"):
        yield f"| {part} | " + " | ".join(f"{ms(trials, part):.1f}" for trials in trained.values()) + " |"
    shares = [f"{ms(trials, 'all, CPU') / (10 * TRIAL):.1f} %" for trials in trained.values()]
    yield f"| CPU, of {TRIAL:.0f} s | " + " | ".join(shares) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--window", type=int, default=40, help="trials that are run at either end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage")
    optuna.logging.set_verbosity(logging.ERROR)
    base = timm.create_model(arguments.model, num_classes=10)
    space = nas_kd.Space(base, budget="params=30%", img_size=64, options=parse_options("width,kernel,conv,keep"))
    print("# What a trial costs beside its training\n")
    print(
        f"`python studies/bookkeeping.py --model {arguments.model} --trials {arguments.trials}`, seed 0, "
        f"{datetime.date.today()}, {platform.machine()}, one thread of a shared machine, optuna {optuna.__version__}. "
        f"{len(space.blocks)} blocks, {len(space.distributions)} parameters. Medians, in ms of processor time where "
        "nothing else is said.\n"
    )
    print(" ".join(__doc__.split("\n\n")[2].split()) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(sqlite_url(Path(folder) / "study.db"))
        windows = ends_of_a_study(space, storage, arguments.trials, arguments.window)
        close_storage(storage)
    print("\n".join(["## A trained trial, on SQLite\n", *table(windows)]))
    over = over_budget(space, arguments.trials, 5 * arguments.window)
    print("\n## An over-budget trial, the storage in memory\n")
    print(f"{ms(over, 'all, CPU'):.1f} ms, the median of {len(over)} (a random sampler's).")


def over_budget(space: nas_kd.Space[nn.Module], trials: int, asks: int) -> list[dict[str, float]]:
    """The over-budget ones of so many random trials, beside `trials` that are finished."""
    study = study_of(space, InMemoryStorage(), "random")
    run(study, space, Limits(target=lambda: 1))
    fill(study, space, trials)
    target = count_trained(study) + asks
    found = run(study, space, Limits(target=lambda: target, cap=1))
    return [trial for trial in found if not trial["trained"]]


def ends_of_a_study(
    space: nas_kd.Space[nn.Module], storage: BaseStorage, trials: int, window: int
) -> dict[str, list[dict[str, float]]]:
    """The first and the last trials of a study, by name of the window."""
    study = study_of(space, storage, "knapsack")
    space.enqueue(study)
    first = run(study, space, Limits(target=lambda: window))
    fill(study, space, trials - window)
    before = len(study.get_trials(deepcopy=False))
    target = count_trained(study) + window
    last = run(study, space, Limits(target=lambda: target))
    return {f"trials 1–{len(first)}": first, f"trials {before + 1}–{before + len(last)}": last}


if __name__ == "__main__":
    main()
