"""How structure learning decides: how channels in use are counted, how λ is found, which weights and channels stay.

    python studies/learnt_widths.py --data-dir DIR --initial-checkpoint cifar10_resnet20.safetensors \
        > docs/results/learnt_widths.md

A trained base on CIFAR-10, half of its MACs, inner widths alone. Widths are learnt on `--images` images, twice. Each
student that comes of it is cut within the budget, its batch norms are recalibrated, and it is distilled on the same
images once. All on validation images, which the weights have seen: they rank, and are no accuracies to quote. Rows are
kept in `rows.jsonl` of the output folder: a killed study goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import nas_kd.models  # noqa: F401  registers the bases
from nas_kd import Space
from nas_kd.data.augment import Augmentation
from nas_kd.data.splits import DataSpec, Splits, load_splits
from nas_kd.files.records import Records
from nas_kd.learnt_widths.learning import Goal, LearntWidths, WidthLearner, learn_widths
from nas_kd.search.options import parse_options
from nas_kd.search.solver import solve
from nas_kd.students.inheritance import inherit_student
from nas_kd.training.checkpoint import load_checkpoint
from nas_kd.training.evaluation import CALIBRATION, evaluate, recalibrate
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
from nas_kd.training.views import Views, ViewSpec, build_views

SHARE, WITHIN = "macs=50%", 0.5
TRAININGS, LARGEST = 4, 1000.0  # of a bisection, on the logarithm of λ from 1 to this
HEADINGS = (
    "channels in use",
    "λ",
    "weights",
    "channels kept by",
    "trainings",
    "in use %",
    "student %",
    "cut",
    "distilled",
)
Row = dict[str, Any]


class SumOfScales(WidthLearner):
    """Counts channels as MorphNet does, by Σ|γ|, here in units of what the base's are on average."""

    def counts(self) -> Tensor:
        strengths = self.scales.strengths()
        if not hasattr(self, "unit"):
            sums = self.scales.per_segment(strengths.detach())
            self.unit = sums / torch.bincount(self.scales.segment)
        return torch.maximum(self.scales.per_segment(strengths) / self.unit, self.least)


class Study:
    """A base, its data, and everything that has been measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.base: nn.Module = timm.create_model(arguments.model).eval()
        load_checkpoint(self.base, Path(arguments.initial_checkpoint))
        config: Any = self.base.pretrained_cfg
        form = {
            "img_size": 32,
            "mean": config["mean"],
            "std": config["std"],
            "train_images": arguments.images * 10 // 9,
        }
        spec = DataSpec(dataset="folder", data_dir=arguments.data_dir, val_fraction=0.1, **form)
        self.splits: Splits = load_splits(spec, arguments.out / "cache")
        views = ViewSpec(count=2, augmentation=Augmentation(), key=self.splits.digest)
        self.views: Views = build_views(self.splits.train, self.base, views, arguments.out / "cache")
        self.space = Space(self.base, budget=SHARE, options=parse_options("width"), name=arguments.model)
        self.records = Records(arguments.out / "rows.jsonl")

    def learn(self, kind: type[WidthLearner], weighted: bool, strength: float | None) -> LearntWidths:
        assert self.space.budget is not None
        learner = kind(self.base, self.space.analysis, Goal(budget=self.space.budget, factors={}, strength=strength))
        if not weighted:
            learner.scales.weights = torch.ones_like(learner.scales.weights)
            learner.first_shares = torch.tensor([learner.shares()["macs"]], dtype=torch.float64)
        recipe = Recipe(epochs=2, warmup=0.1, amp=True)
        return learn_widths(learner, self.views, recipe)

    def bisect(self) -> LearntWidths:
        """Trains anew with one λ after another: the last one whose cost was within the budget."""
        low, high, best = 1.0, LARGEST, None
        for _ in range(TRAININGS):
            middle = (low * high) ** 0.5
            learnt = self.learn(WidthLearner, True, middle)
            if learnt.shares["macs"] <= WITHIN:
                high, best = middle, learnt
            else:
                low = middle
        return best or learnt

    def students(self, learnt: LearntWidths, facts: Row, ways: tuple[tuple[str, str], ...]) -> Iterator[Row]:
        """Cuts and distils: with the weights and channels of each way."""
        space, analysis = self.space, self.space.analysis
        assert space.budget is not None
        genotype = solve(space.table, space.budget, learnt.damages(analysis, {}))
        assert genotype is not None
        share = space.table.cost(genotype).macs / space.table.base().macs
        for weights, kept in ways:
            order = learnt.order(analysis) if kept == "strength" else None
            source = learnt.network if weights == "learnt" else self.base
            student = inherit_student(source, analysis, genotype, importance=order)
            recalibrate(student, self.views.sample(CALIBRATION))
            cut = evaluate(student, self.splits.val)
            train(student, self.views, Recipe(epochs=1, amp=True, seed=1))
            facts = {**facts, "weights": weights, "kept": kept, "in use": learnt.shares["macs"], "student": share}
            yield {**facts, "cut": cut, "distilled": evaluate(student, self.splits.val)}

    def rows(self) -> Iterator[Row]:
        """Every row, from the records or measured now."""
        usual = (("learnt", "importance"),)
        for count, found, ways in (
            ("(Σs)²/Σs², s = importance · |γ|/|γ₀|", "led", (*usual, ("learnt", "strength"), ("base's", "importance"))),
            ("(Σs)²/Σs², s = |γ|", "led", (*usual, ("learnt", "strength"))),
            ("Σ|γ| (MorphNet)", "led", usual),
            ("(Σs)²/Σs², s = importance · |γ|/|γ₀|", "bisection", usual),
        ):
            key = f"{count} {found}"
            if key not in self.records:
                started = time.process_time()
                if found == "bisection":
                    learnt = self.bisect()
                else:
                    learnt = self.learn(SumOfScales if "MorphNet" in count else WidthLearner, "·" in count, None)
                seconds = time.process_time() - started
                trainings = TRAININGS if found == "bisection" else 1
                facts = {"count": count, "found": found, "trainings": trainings, "seconds": seconds}
                self.records[key] = {"rows": list(self.students(learnt, facts, ways))}
            yield from self.records[key]["rows"]


def table(rows: Iterator[Row]) -> Iterator[str]:
    yield f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}"
    for row in rows:
        percents = (f"{100 * row[name]:.1f}" for name in ("in use", "student", "cut", "distilled"))
        how = (row["count"].replace("|", "\\|"), row["found"], row["weights"], row["kept"])
        effort = f"{row['trainings']} ({row['seconds']:.0f} s)"
        yield f"| {' | '.join((*how, effort, *percents))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20", help="timm model")
    parser.add_argument("--data-dir", required=True, help="image folders: train/CLASS/*.png, test/CLASS/*.png")
    parser.add_argument("--initial-checkpoint", required=True, help="the base's weights")
    parser.add_argument("--images", type=int, default=6400, help="training images")
    parser.add_argument("--out", type=Path, default=Path("results/learnt_widths"), help="where rows and cache are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(arguments)
    print("# How structure learning decides\n")
    print(
        f"`python studies/learnt_widths.py --model {arguments.model} --images {arguments.images} --data-dir cifar10 "
        f"--initial-checkpoint {Path(arguments.initial_checkpoint).name}`, one seed, {datetime.date.today()}, "
        f"{platform.machine()}, one core of a shared machine, torch {torch.__version__}, timm {timm.__version__}.\n"
    )
    print(
        "Half of the MACs. In use: the cost of the channels in use at the end of the learning; student: of what was "
        f"cut; both in shares of the base's. Accuracy on {len(study.splits.val)} validation images, which the weights "
        "have seen: a ranking. Seconds of CPU time.\n"
    )
    for line in table(study.rows()):
        print(line)


if __name__ == "__main__":
    main()
