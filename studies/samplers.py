"""Samplers on a tabulated truth: real trainings, looked up instead of run.

    python studies/samplers.py > docs/results/samplers.md      # some minutes; --seeds 3 for a look

The table (docs/results/samplers_table.json, made by studies/tabulate_trials.py) holds what a trial of every genotype
within the budget scores at each of its rungs (with running averages; trials by now recalibrate their batch norms
before each look). A study within the budget asks a sampler until so many trials have trained; over-budget proposals
are pruned with their constraints, repeated genotypes take the score of the first, and neither counts as trained.
Quality is the hypervolume of scores and costs within the budget over that of the whole table: 1 means that the true
front was found.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from nas_kd.arguments.study import parse_study
from nas_kd.budget import Cost
from nas_kd.genotype import Genotype
from nas_kd.preparation.job import make_base
from nas_kd.preparation.opening import make_space
from nas_kd.search.rungs import RungScore, deficit
from nas_kd.search.sampler import KnapsackSampler, make_optuna_sampler
from nas_kd.search.space import Space
from nas_kd.search.starts import mixed_starts

TABLE = Path("docs/results/samplers_table.json")
COUNTS, ASKS = (30, 60, 120), 3000
SHORT = COUNTS[:2]  # of all but random search: at 120 they have seen most of the table
EARLY = (14, 20, 30)  # a study has 20 trials by default
OURS, RANDOM = "knapsack", "random within budget"
SAMPLERS = (RANDOM, "nsgaii", "nsgaiii", "tpe", OURS)
Row = tuple[int, ...]  # the position of each block's choice


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """The table's space and budget; `costs` are the objectives beside the score. `scores` by row, at each rung."""

    budget: str
    costs: tuple[str, ...]
    space: Space[nn.Module]
    damages: list[NDArray[np.float64]]
    rungs: tuple[int, ...]
    scores: Mapping[Row, tuple[float, ...]]
    prices: Mapping[Row, Cost]

    def row(self, genotype: Mapping[str, Any]) -> Row:
        return tuple(self.space.table.indices(genotype).tolist())

    def values(self, row: Row) -> tuple[float, ...]:
        return (self.scores[row][-1], *(float(self.prices[row][kind]) for kind in self.costs))

    def quality(self, rows: list[Row]) -> float:
        """The hypervolume of these genotypes, of that of all: scores from the worst up, costs from the bound down."""
        return self._hypervolume(rows) / self._hypervolume(list(self.scores))

    def _hypervolume(self, rows: list[Row]) -> float:
        assert self.space.budget is not None
        final = np.array([scores[-1] for scores in self.scores.values()])
        bounds = [self.space.budget[kind] for kind in self.costs]
        values = np.array([self.values(row) for row in rows]).reshape(len(rows), 1 + len(bounds))
        gains = (values[:, :1] - final.min()) / (final.max() - final.min())
        return hypervolume(np.concatenate([gains, 1 - values[:, 1:] / bounds], axis=1))


def hypervolume(points: NDArray[np.float64]) -> float:
    """What N points (N × D, every coordinate the more the better) dominate of the space above the origin.

    >>> hypervolume(np.array([[1.0, 0.5], [0.5, 1.0]]))
    0.75
    """
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    points = points[np.argsort(-points[:, -1])]
    heights = np.append(points[:, -1], 0.0)
    steps = zip(range(1, len(points) + 1), heights, heights[1:], strict=False)
    return sum(float(high - low) * hypervolume(points[:count, :-1]) for count, high, low in steps if high > low)


def load(path: Path, costs: tuple[str, ...]) -> Problem:
    """The problem of a table: within its budget, with the score and these costs as objectives."""
    table = json.loads(path.read_text())
    settings = parse_study(table["study"].split())
    space = make_space(settings, make_base(settings.network, 10, 1, settings.seed))
    scores, prices = {}, {}
    for name, params, macs, *at_rungs in table["rows"]:
        row = tuple(map(int, name))
        scores[row], prices[row] = tuple(at_rungs), space.cost(space.table.genotype(row))
        assert (prices[row].params, prices[row].macs) == (params, macs), f"the space has changed: make {path} anew"
    return Problem(
        budget=str(settings.search.budget),
        costs=costs,
        space=space,
        damages=[np.array(damage) for damage in table["damages"]],
        rungs=tuple(table["rungs"]),
        scores=scores,
        prices=prices,
    )


class RandomWithinBudget(optuna.samplers.RandomSampler):
    """Genotypes that are within the budget, evenly, each once."""

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(seed)
        self.problem, self.left = problem, list(problem.scores)
        np.random.default_rng(seed).shuffle(self.left)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return dict(self.problem.space.distributions)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        # with pruning more are asked for than there are: then they are repeated
        row = self.left.pop() if len(self.left) > 1 else self.left[0]
        return self.problem.space.point(self.problem.space.table.genotype(row))


def make(name: str, problem: Problem, seed: int) -> optuna.samplers.BaseSampler:
    if name == RANDOM:
        return RandomWithinBudget(problem, seed)
    if name == OURS:
        return KnapsackSampler(problem.space, damages=problem.damages, seed=seed)
    return make_optuna_sampler(name, seed)


@dataclass(slots=True)
class Search:
    """What a study did: per trained trial its genotype, the share of a whole training that it took, and whether it was
    stopped; how many proposals were over budget or repeated; seconds of asking."""

    trained: list[tuple[Row, float, bool]] = field(default_factory=list)
    over: int = 0
    repeated: int = 0
    seconds: float = 0.0

    @property
    def asks(self) -> int:
        return len(self.trained) + self.over + self.repeated

    def after(self, trainings: float) -> list[Row]:
        """The genotypes that were trained to their end when so many whole trainings were spent."""
        spent = np.cumsum([share for _, share, _ in self.trained])
        return [r for (r, _, stop), s in zip(self.trained, spent, strict=True) if s <= trainings + 1e-9 and not stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """`warm`: with the command's starts; `pruning`: trials are stopped at rungs; so many are proposed `together`."""

    warm: bool
    pruning: bool
    together: int = 1


def search(problem: Problem, name: str, seed: int, how: How, trainings: int) -> Search:
    """A study of this problem until so many whole trainings were spent."""
    sampler = make(name, problem, seed)
    study = optuna.create_study(directions=["maximize", *["minimize" for _ in problem.costs]], sampler=sampler)
    if how.warm:
        queue(study, problem, mixed_starts(problem.space.table, problem.space.budget, 8, problem.damages))
    found, known = Search(), {}
    while sum(share for _, share, _ in found.trained) < trainings - 1e-9 and found.asks < ASKS:
        started = time.process_time()
        if how.together > 1 and not study.get_trials(states=(TrialState.WAITING,)):
            queue(study, problem, sampler.propose(study, how.together))
        trial = study.ask()
        genotype = problem.space.suggest_genotype(trial)
        found.seconds += time.process_time() - started
        try:
            problem.space.admit(trial, genotype)
        except optuna.TrialPruned:
            found.over += 1
            study.tell(trial, state=TrialState.PRUNED)
            continue
        row = problem.row(genotype)
        if row in known:
            found.repeated += 1
            share, behind = known[row]
        else:
            share, behind = known[row] = train(problem, row, known if how.pruning else {})
            found.trained.append((row, share, behind > 0))
        for epoch, score in zip(problem.rungs, problem.scores[row], strict=True):
            if epoch <= share * problem.rungs[-1]:
                trial.set_user_attr(f"rung/{epoch}", score)  # our sampler learns from stopped trials, too
        trial.set_constraint("rung", behind)
        if behind > 0:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, problem.values(row))
    return found


def queue(study: optuna.Study, problem: Problem, genotypes: Iterable[Genotype]) -> None:
    for genotype in genotypes:
        study.enqueue_trial(problem.space.point(genotype))


def train(problem: Problem, row: Row, peers: Mapping[Row, tuple[float, float]]) -> tuple[float, float]:
    """The share of a whole training that a trial takes beside `peers`, and how far it was behind where it stopped."""
    for index, epoch in enumerate(problem.rungs[:-1]):
        share = epoch / problem.rungs[-1]
        there = [other for other, (spent, _) in peers.items() if spent >= share]
        scores = [
            RungScore(
                cost=problem.prices[other],
                score=problem.scores[other][index],
                end=problem.scores[other][-1] if peers[other][0] == 1 else None,
            )
            for other in there
        ]
        own = RungScore(cost=problem.prices[row], score=problem.scores[row][index])
        behind = deficit(own, scores, kinds=problem.costs)
        if behind > 0:
            return share, behind
    return 1.0, 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One sampler on one problem: quality by number of trainings, one number per seed; and the searches."""

    name: str
    warm: bool
    quality: Mapping[int, list[float]]
    searches: list[Search]

    @property
    def label(self) -> str:
        return f"{self.name}, {'with starts' if self.warm else 'cold'}"

    def cell(self, count: int) -> str:
        if count not in self.quality:
            return ""
        each = self.quality[count]
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        return f"{statistics.mean(each):.3f} ± {error:.3f}"

    def mean_of(self, what: Callable[[Search], float]) -> float:
        return statistics.mean(map(what, self.searches))


def compare(problem: Problem, name: str, seeds: int, how: How, counts: tuple[int, ...]) -> Result:
    searches = [search(problem, name, seed, how, counts[-1]) for seed in range(seeds)]
    quality = {count: [problem.quality(found.after(count)) for found in searches] for count in counts}
    return Result(name=name, warm=how.warm, quality=quality, searches=searches)


def comparison(problem: Problem, seeds: int) -> Iterator[str]:
    """The table of one problem, and the targets."""
    starts = [problem.row(g) for g in mixed_starts(problem.space.table, problem.space.budget, 8, problem.damages)]
    yield f"\n## Objectives: score, {', '.join(problem.costs)}\n"
    yield (
        f"{len(problem.scores)} of {math.prod(len(block.choices) for block in problem.space.blocks):,} genotypes are "
        f"within {problem.budget}; the {len(starts)} starts alone are worth {problem.quality(starts):.3f}.\n"
    )
    counts = " | ".join(f"after {count}" for count in COUNTS)
    yield f"| sampler | starts | {counts} | trained | over budget | repeated | ms per proposal |"
    yield f"|---|---|{'---|' * len(COUNTS)}---|---|---|---|"
    results: dict[tuple[str, bool], Result] = {}
    for warm in (False, True):
        for name in SAMPLERS:
            counted = COUNTS if name == RANDOM and not warm else SHORT
            result = compare(problem, name, seeds, How(warm=warm, pruning=False), counted)
            results[name, warm] = result
            cells = " | ".join(result.cell(count) for count in COUNTS)
            facts = [result.mean_of(lambda s: len(s.trained)), *map(result.mean_of, (over_of, repeated_of))]
            ms = result.mean_of(lambda s: 1000 * s.seconds / s.asks)
            shown = " | ".join(f"{fact:.0f}" for fact in facts)
            yield f"| {name} | {len(starts) if warm else 'none'} | {cells} | {shown} | {ms:.0f} |"
    yield "\n| target | difference | |\n|---|---|---|"
    for ours in (results[OURS, True], results[OURS, False]):
        for other, count in ((RANDOM, 120), ("nsgaii", 60), ("tpe", 60)):
            yield verdict(ours, 30, results[other, False], count)
    for other in ("nsgaii", "tpe"):
        yield verdict(results[OURS, True], 30, results[other, True], 30)


def over_of(found: Search) -> float:
    return found.over


def repeated_of(found: Search) -> float:
    return found.repeated


def verdict(ours: Result, count: int, other: Result, others: int) -> str:
    pairs = zip(ours.quality[count], other.quality[others], strict=True)
    gaps = [own - rival for own, rival in pairs]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    gap = statistics.mean(gaps)
    words = "met" if gap >= 0 else "missed"
    return f"| {ours.label}, at {count} ≥ {other.label}, at {others} | {gap:+.3f} ± {error:.3f} | {words} |"


def stopping(problem: Problem, seeds: int) -> Iterator[str]:
    """What stopping trials at rungs is worth, at equal trained images."""
    yield "\n### Stopping at rungs, or not (with starts)\n"
    columns = " | ".join(f"after the images of {n} trainings" for n in SHORT)
    yield f"| sampler | stopping | {columns} | ended | stopped |"
    yield f"|---|---|{'---|' * len(SHORT)}---|---|"
    for name in (RANDOM, "tpe", OURS):
        for pruning in (False, True):
            result = compare(problem, name, seeds, How(warm=True, pruning=pruning), SHORT)
            cells = " | ".join(result.cell(count) for count in SHORT)
            stopped = result.mean_of(lambda s: sum(stop for _, _, stop in s.trained))
            ended = result.mean_of(lambda s: len(s.trained)) - stopped
            yield f"| {name} | {'at rungs' if pruning else 'none'} | {cells} | {ended:.0f} | {stopped:.0f} |"


def together(problem: Problem, seeds: int) -> Iterator[str]:
    """What it costs to propose several at a time, each as if those before it were in training."""
    yield "\n### Several proposals at a time (with starts, stopping at rungs)\n"
    yield f"| proposals at a time | {' | '.join(f'after {count}' for count in EARLY)} |"
    yield f"|---|{'---|' * len(EARLY)}"
    for count in (1, 2, 4, 8):
        result = compare(problem, OURS, seeds, How(warm=True, pruning=True, together=count), EARLY)
        yield f"| {count} | {' | '.join(result.cell(trainings) for trainings in EARLY)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--part", choices=("comparison", "stopping", "together"), help="this one alone")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(logging.ERROR)
    print("# Samplers on a table of real trainings\n")
    print(
        f"`python studies/samplers.py --seeds {arguments.seeds}`, seeds 0–{arguments.seeds - 1}, "
        f"{datetime.date.today()}, {platform.machine()}, optuna {optuna.__version__}. The table: "
        f"{json.loads(arguments.table.read_text())['about']}.\n"
    )
    print(__doc__.split("\n\n")[2].replace("\n", " "))
    print(
        f"Means over seeds ± standard error; at most {ASKS:,} proposals. `cold`: no starts; starts are the command's."
    )
    parts = {"comparison": comparison, "stopping": stopping, "together": together}
    command, alone = load(arguments.table, ("params", "macs")), load(arguments.table, ("macs",))
    todo = (("comparison", command), ("stopping", command), ("together", command), ("comparison", alone))
    for part, problem in todo:
        for line in parts[part](problem, arguments.seeds) if arguments.part in (None, part) else ():
            print(line, flush=True)


if __name__ == "__main__":
    main()
