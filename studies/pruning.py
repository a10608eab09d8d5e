"""Our students beside torch-pruning's, at the same MACs and after the same distillation.

    python studies/pruning.py --data-dir cifar10 --initial-checkpoint cifar10_resnet20.safetensors

Every arm gets the same teacher, images, teacher logits (cached views), recipe and number of images; arms that inherit
weights get their batch norms recalibrated first. Phases, each going on from what is on disk (`runs.jsonl`):

- `screen`: each torch-pruning method once, 6,400 images, seed 0, 30 % of the base's MACs; the best of each kind goes on
- `lr`: each arm, and the best method, at several learning rates, seed 0, 30 %, 25,600 images; the best rate stays
- `short`: 25,600 images, three budgets, three seeds
- `untrained`: no training at all, 70 % of the MACs; all methods
- `long`: ten times the images, 30 %, and of torch-pruning's methods the best; each arm at its rate, and at that of
  torch-pruning, which has the larger one

What goes on is decided on the validation split. A run is tested at its end and only the table shows it. `--smoke` takes
a minute. The table (docs/results/pruning.md) is written from all lines after every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import functools
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from pruned import METHODS, prune
from torch import nn

from nas_kd import Genotype, Space
from nas_kd.budget import Budget, parse_budget
from nas_kd.costs.verification import measure
from nas_kd.data.augment import Augmentation, derive_seed
from nas_kd.data.images import Images
from nas_kd.data.splits import DataSpec, load_splits
from nas_kd.library.building import LibrarySpec, build_library
from nas_kd.library.library import Library
from nas_kd.search.options import parse_options
from nas_kd.search.solver import solve
from nas_kd.search.starts import prior_damages, uniform_width_student
from nas_kd.students.building import build_student
from nas_kd.training.checkpoint import load_checkpoint
from nas_kd.training.evaluation import evaluate, recalibrate
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
from nas_kd.training.views import Views, ViewSpec, build_views

PHASES = ("screen", "lr", "short", "untrained", "long")
PRUNED = {str(method): method for method in METHODS}
OURS, CLOSED = "ours", "ours, closed form"
SCRATCH, NO_TEACHER = "scratch + KD", "scratch, no teacher"
ARMS = (OURS, CLOSED, "uniform", SCRATCH, NO_TEACHER, *PRUNED)
RATES = {SCRATCH: (0.1, 0.2), NO_TEACHER: (0.1, 0.2)}  # the first goes where none was chosen
INHERITED = (0.05, 0.025, 0.015, 0.0075, 0.004, 0.002)
SCREENED, UNTRAINED = 30, 70  # % of the base's MACs
CALIBRATION = 512
EPOCHS, VIEWS = 6, 3  # of the long run; a seed begins with another view
NOTES = """Test accuracy in % (10,000 images), mean ± standard deviation over seeds (one run where there is none);
seconds of CPU time on one core, of the training and of what comes before it: pruning, inheritance, and for `ours` the
whole library, which is built once for all budgets and seeds.

All arms: the same teacher, images, cached augmented views with its logits, and recipe (batches of 64, SGD one-cycle,
T = 4, distill weight 0.9, bfloat16). `ours`: the knapsack solution on the damages of the library of block choices, and
its weights. `ours, closed form`: a prior's damages, inherited weights, no library. `uniform`: the widest of the widths
1, 0.75, 0.5, … that fits, everywhere, residual streams too, and so below the budget. `scratch`: the genotype of `ours`
with fresh weights.

torch-pruning prunes in 50 rounds, close to the bound group by group; `inner` leaves residual streams as they are,
`whole` narrows them (with a stand-in for the option-A shortcut, which it cannot narrow itself). Its Hessian importance
is left out: in this version it forgets all but the last image's gradient. All arms but fresh ones get their batch norms
recalibrated on the same 512 augmented images. The teacher has seen the validation images: they only rank."""
COLUMNS = ("arm", "test", "seeds", "MACs", "params", "lr", "training s", "preparation s")


@dataclass(frozen=True, slots=True)
class Key:
    """What makes a run: `budget` in % of the base's MACs, `images` shown in training."""

    arm: str
    budget: int
    images: int
    seed: int
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One line of `runs.jsonl`. Accuracies are fractions, NaN where there is none; seconds are of one core (CPU time):
    of the training, and of what comes before it (pruning, inheritance, a library). Without a network (torch-pruning did
    not get within the budget) there is no accuracy."""

    key: Key
    val: float = math.nan
    test: float = math.nan
    macs: int = 0
    params: int = 0
    seconds: float = 0.0
    preparation: float = 0.0


class Study:
    """The materials, and the finished runs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, Path(arguments.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base = timm.create_model(arguments.model)
        load_checkpoint(self.base, Path(arguments.initial_checkpoint))
        self.base.eval()
        self.size = tuple(self.base.pretrained_cfg["input_size"])
        self.macs = measure(self.base, self.size).macs
        self.short = 640 if arguments.smoke else 25_600
        self.screening = self.short // 4
        distinct = 640 if arguments.smoke else 42_624  # whole batches
        self.long = EPOCHS * distinct
        self.views, self.val, self.test = self._data(distinct)
        self.runs = {run.key: run for run in read(self.folder / "runs.jsonl")}

    def _data(self, distinct: int) -> tuple[Views, Images, Images]:
        config, cache = self.base.pretrained_cfg, self.folder / "cache"
        form = {"img_size": self.size[1], "mean": config["mean"], "std": config["std"], "val_fraction": 0.1}
        splits = load_splits(DataSpec(dataset="folder", data_dir=self.arguments.data_dir, **form), cache)
        generator = torch.Generator().manual_seed(0)
        train, val, test = (
            part[torch.randperm(len(part), generator=generator)] for part in (splits.train, splits.val, splits.test)
        )
        if self.arguments.smoke:
            val, test = val[:200], test[:200]
        spec = ViewSpec(count=1 if self.arguments.smoke else VIEWS, augmentation=Augmentation(), key=splits.digest)
        return build_views(train[:distinct], self.base, spec, cache), val, test

    def shown(self, seed: int, images: int) -> Views:
        """What a run is trained on: for every arm the same, for every seed another view and other images first."""
        views, first = self.views, seed % self.views.count
        if images == self.long:
            pixels, logits = views.pixels.roll(-first, 0), views.logits.roll(-first, 0)
            return dataclasses.replace(views, pixels=pixels, logits=logits)
        generator = torch.Generator().manual_seed(derive_seed(seed, "images"))
        chosen = torch.randperm(len(views), generator=generator)[: images or CALIBRATION]
        pixels, logits = views.pixels[first, chosen][None], views.logits[first, chosen][None]
        return dataclasses.replace(views, pixels=pixels, labels=views.labels[chosen], logits=logits)

    def run(self, key: Key) -> None:
        """Trains and tests what `key` says, and writes its line; does nothing when it is there already."""
        if key in self.runs:
            return
        views = self.shown(key.seed, key.images)
        spent = self.library_seconds() if key.arm == OURS else 0.0
        started = time.process_time()
        student = self._student(key, views.sample(CALIBRATION))
        preparation = spent + time.process_time() - started
        run = Run(key=key, preparation=preparation)
        if student is not None:
            cost = measure(student, self.size)
            assert cost.macs <= key.budget / 100 * self.macs, f"{key} is over its budget"
            started = time.process_time()
            if key.images:
                train(student, views, self._recipe(key))
            seconds = time.process_time() - started
            decides = (key.seed, key.budget) == (0, SCREENED)
            val = evaluate(student, self.val) if decides else math.nan
            test = math.nan if key.images == self.screening else evaluate(student, self.test)
            run = dataclasses.replace(run, val=val, test=test, macs=cost.macs, params=cost.params, seconds=seconds)
        self.runs[key] = run
        with (self.folder / "runs.jsonl").open("a") as file:
            file.write(json.dumps(dataclasses.asdict(run)) + "\n")
        print(f"{key}: val {100 * run.val:.2f}, {run.seconds:.0f} s, {run.macs / self.macs:.4f}", flush=True)
        self.write()

    def write(self) -> None:
        """Writes the table."""
        Path(self.arguments.report).write_text("\n".join(report(self)) + "\n")

    def _recipe(self, key: Key) -> Recipe:
        recipe = Recipe(epochs=EPOCHS if key.images == self.long else 1, lr=key.lr, seed=key.seed, amp=True)
        return dataclasses.replace(recipe, distill_weight=0.0) if key.arm == NO_TEACHER else recipe

    def _student(self, key: Key, calibration: Images) -> nn.Module | None:
        """The network that a run begins with; None when torch-pruning cannot get to the budget."""
        if key.arm in PRUNED:
            budget = Budget((("macs", key.budget / 100 * self.macs),))
            student = prune(self.base, PRUNED[key.arm], budget, calibration)
        else:
            space, genotype = self._solution(key)
            if key.arm in (SCRATCH, NO_TEACHER):
                torch.manual_seed(derive_seed(key.seed, "fresh weights"))
                return build_student(timm.create_model(self.arguments.model), space.analysis, genotype)
            student = (self.library if key.arm == OURS else space).student(genotype)
        if student is not None:
            recalibrate(student, calibration)
        return student

    def _solution(self, key: Key) -> tuple[Space[nn.Module], Genotype]:
        options = parse_options("width", search_stages=True) if key.arm == "uniform" else None
        space = Space(self.base, options=options)
        budget = parse_budget(f"macs={key.budget}%", space.table.base())
        if key.arm == "uniform":
            genotype = uniform_width_student(space.table, budget)
        else:
            damages = prior_damages(space.table) if key.arm == CLOSED else self.library.damages()
            genotype = solve(space.table, budget, damages, seconds=60)
        assert genotype is not None
        return space, genotype

    @functools.cached_property
    def library(self) -> Library:
        """The library of the base, built once for all budgets and seeds; its CPU time is kept beside it."""
        started, note = time.process_time(), self.folder / "library.json"
        space, spec = Space(self.base), LibrarySpec()
        images = self.views.sample(spec.images + spec.holdout)
        library = build_library(self.base, space.analysis, images, spec, self.folder / "cache")
        if not note.exists():
            note.write_text(json.dumps(time.process_time() - started))
        return library

    def library_seconds(self) -> float:
        """CPU seconds that the library took when it was built."""
        _ = self.library
        return float(json.loads((self.folder / "library.json").read_text()))

    def best(self, arms: Iterable[str], count: int, images: int) -> list[str]:
        """The arms with the best validation accuracy of seed 0 at the screened budget after so many images."""
        found = {arm: max((run.val for run in self.decisive(arm, images)), default=-1.0) for arm in arms}
        return sorted((arm for arm in found if found[arm] >= 0), key=lambda arm: -found[arm])[:count]

    def lr(self, arm: str) -> float:
        """The learning rate chosen for an arm; torch-pruning's methods share one."""
        runs = [run for other in (PRUNED if arm in PRUNED else (arm,)) for run in self.decisive(other, self.short)]
        return max(runs, key=lambda run: run.val).key.lr if runs else RATES.get(arm, INHERITED)[0]

    @property
    def pruned_lr(self) -> float:
        """The learning rate that torch-pruning's methods share."""
        return self.lr(next(iter(PRUNED)))

    def decisive(self, arm: str, images: int) -> list[Run]:
        """The runs of an arm by which something is decided."""
        runs = [run for key, run in self.runs.items() if (key.arm, key.budget, key.seed) == (arm, SCREENED, 0)]
        return [run for run in runs if run.key.images == images and run.macs]

    def kept(self, images: int) -> list[str]:
        """The best torch-pruning method of each kind: local or global, with or without the streams; the best first."""
        kinds = {(method.ranking, method.part): [] for method in METHODS}
        for arm, method in PRUNED.items():
            kinds[method.ranking, method.part].append(arm)
        return self.best([arm for arms in kinds.values() for arm in self.best(arms, 1, images)], len(kinds), images)

    def plan(self, phase: str) -> Iterator[Key]:
        """The runs of a phase, of the arms asked for. What went on is looked up when it is needed."""
        arms = [arm for arm in ARMS if any(fnmatch.fnmatch(arm, pattern) for pattern in self.arguments.arms)]
        seeds = self.arguments.seeds
        others = [arm for arm in arms if arm not in PRUNED]
        if phase == "screen":
            yield from (Key(arm, SCREENED, self.screening, 0, INHERITED[0]) for arm in arms if arm in PRUNED)
            return
        if phase == "untrained":
            for arm in arms:
                often = seeds if arm not in PRUNED else seeds[:1]
                yield from (Key(arm, UNTRAINED, 0, seed, 0.0) for seed in often if "scratch" not in arm)
            return
        if phase == "lr":
            first, *rest = self.kept(self.screening)
            for arm in [*others, *([first] if first in arms else [])]:
                yield from (Key(arm, SCREENED, self.short, 0, lr) for lr in RATES.get(arm, INHERITED))
            yield from (Key(arm, SCREENED, self.short, 0, self.lr(arm)) for arm in rest if arm in arms)
            return
        kept = self.kept(self.short)
        if phase == "long":
            final = [*others, *(arm for arm in kept[:1] if arm in arms)]
            for seed, arm in itertools.product(seeds, final):
                rates = dict.fromkeys((self.pruned_lr, self.lr(arm)))
                yield from (Key(arm, SCREENED, self.long, seed, lr) for lr in rates)
            return
        final = [*others, *(arm for arm in kept if arm in arms)]
        for budget, seed in itertools.product(self.arguments.budgets, seeds):
            yield from (Key(arm, budget, self.short, seed, self.lr(arm)) for arm in final)


def read(path: Path) -> Iterator[Run]:
    """The finished runs; a last line that was cut off is left out."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield Run(**{**fields, "key": Key(**fields["key"])})


def report(study: Study) -> Iterator[str]:
    """The tables, as Markdown."""
    yield f"# Students of {study.arguments.model} beside torch-pruning's\n"
    yield (
        f"`{command(study)}`, {datetime.date.today()}, {platform.machine()}, one thread of a shared machine, torch "
        f"{torch.__version__}, timm {timm.__version__}, torch-pruning {version('torch-pruning')}.\n\n{NOTES}"
    )
    tables = sorted({(key.images, key.budget) for key in study.runs}, key=lambda pair: (pair[0] != study.short, pair))
    for images, budget in tables:
        if images == study.screening:
            continue
        title = f"after {images:,} images" if images else "after recalibration alone, nothing trained"
        yield f"\n## {budget} % of the MACs ({budget * study.macs / 1e8:.2f} M), {title}\n"
        yield f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
        groups = grouped(study, images, budget)
        yield from (row(runs) for runs in sorted(groups, key=lambda runs: -test_of(runs)))
        chosen = [group for group in groups if not images or group[0].key.lr == study.lr(group[0].key.arm)]
        yield from lead(chosen, "at chosen rates")
        if images == study.long:
            common = [group for group in groups if group[0].key.lr == study.pruned_lr]
            yield from lead(common, f"both at {study.pruned_lr:g}")
    yield "\n## Which methods and learning rates went on\n"
    yield f"Validation accuracy in %, seed 0, {SCREENED} % of the MACs; the screening was before rates were known.\n"
    yield from selection(study)


def lead(groups: list[list[Run]], rates: str) -> Iterator[str]:
    """How far ours is from the best torch-pruning method."""
    tests = {group[0].key.arm: test_of(group) for group in groups}
    pruned = [test for arm, test in tests.items() if arm in PRUNED]
    if OURS in tests and pruned:
        points = 100 * (tests[OURS] - max(pruned))
        yield f"\n`{OURS}` is {points:+.2f} points from the best torch-pruning method, {rates}."


def selection(study: Study) -> Iterator[str]:
    """The table of everything that was decided."""
    columns = [(study.screening, INHERITED[0])]
    columns += [(study.short, lr) for lr in sorted({key.lr for key in study.runs if key.images == study.short})]
    yield "| arm | " + " | ".join(f"{images:,} images, lr {lr:g}" for images, lr in columns) + " |"
    yield f"|---|{'---|' * len(columns)}"
    for arm in dict.fromkeys(key.arm for key in study.runs):
        runs = [run for images in (study.screening, study.short) for run in study.decisive(arm, images)]
        vals = {(run.key.images, run.key.lr): f"{100 * run.val:.2f}" for run in runs}
        if vals:
            yield f"| {arm} | {' | '.join(vals.get(column, '') for column in columns)} |"


def grouped(study: Study, images: int, budget: int) -> list[list[Run]]:
    """The finished runs of each arm and learning rate; after the short training those at the chosen one."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for key, run in study.runs.items():
        if (key.images, key.budget) == (images, budget) and run.macs:
            if images != study.short or key.lr == study.lr(key.arm):
                groups.setdefault((key.arm, key.lr), []).append(run)
    return list(groups.values())


def test_of(runs: list[Run]) -> float:
    """The mean test accuracy."""
    return statistics.mean(run.test for run in runs)


def row(runs: list[Run]) -> str:
    """The line of one arm."""
    key, macs, params = runs[0].key, *(statistics.mean(getattr(r, kind) for r in runs) for kind in ("macs", "params"))
    spread = f" ± {100 * statistics.stdev(run.test for run in runs):.2f}" if len(runs) > 1 else ""
    seconds, before = (statistics.mean(getattr(r, name) for r in runs) for name in ("seconds", "preparation"))
    facts = [key.arm, f"{100 * test_of(runs):.2f}{spread}", len(runs), f"{macs / 1e6:.2f} M", f"{params:,.0f}"]
    return f"| {' | '.join(map(str, [*facts, f'{key.lr:g}', f'{seconds:.0f}', f'{before:.1f}']))} |"


def command(study: Study) -> str:
    """The command that shows it again, without this machine's folders."""
    arguments = study.arguments
    weights = Path(arguments.initial_checkpoint).name
    return f"python studies/pruning.py --model {arguments.model} --data-dir cifar10 --initial-checkpoint {weights}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="cifar_resnet20", help="timm model")
    add("--data-dir", required=True, help="image folders: train/CLASS/*.png, test/CLASS/*.png")
    add("--initial-checkpoint", required=True, help="the teacher's weights")
    add("--out", default="results/pruning", help="where runs.jsonl and the caches are kept")
    add("--report", default="docs/results/pruning.md", help="the table")
    add("--phases", nargs="*", default=PHASES, choices=PHASES, help="all; none writes the table alone")
    add("--arms", nargs="+", default=("*",), help="only arms that fit, e.g. 'torch-pruning*'")
    add("--budgets", nargs="+", type=int, default=(30, 15, 50), help="of the short runs, in percent of the base's MACs")
    add("--seeds", nargs="+", type=int, default=(0, 1, 2))
    add("--smoke", action="store_true", help="a minute: few images, three arms")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.seeds, arguments.budgets = (0,), (30,)
    return arguments


def main() -> None:
    torch.set_num_threads(1)
    study = Study(parse())
    for phase in study.arguments.phases:
        for key in study.plan(phase):
            if not study.arguments.smoke or key.arm in (CLOSED, "uniform", "torch-pruning local l2 whole"):
                study.run(key)
    study.write()


if __name__ == "__main__":
    main()
