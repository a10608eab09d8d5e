"""Students of a pretrained base on photos: ours beside torch-pruning's, at the same MACs, after the same distillation.

    python studies/photos.py --weights FILE --model tf_efficientnet_lite0 --data-dir photos --img-size 96 --seed 0
    python studies/photos.py --page

Every arm gets the product's teacher (anchored norms, linear probe, gentle fine-tuning), the same cached views with its
logits, the same recipe and the same number of images; its batch norms are recalibrated first. `ours` is the knapsack's
solution on the damages of the library, nothing searched; `torch-pruning` the method of `--methods` that is best by
validation. Learning rates are chosen on validation images for both. Last, torch-pruning gets as many epochs more as pay
for the library that ours needs. Each row is one line of `--rows` and is not measured again. The test images are looked
at for every row and decide nothing; `--page` prints a table of all rows as Markdown.

`--views`, `--mixup` and `--mixup-prob` say what both train on, `--recipe` how, in fields of `training.recipe.Recipe`:
`--recipe distill_weight=1 temperature=2`. Without `--methods` ours is trained alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pruned import METHODS, prune
from torch import nn
from transfer import Ground, Rows, Scores, add_ground, make_ground

from nas_kd import Space
from nas_kd.budget import Budget
from nas_kd.costs.verification import measure
from nas_kd.data.images import AugmentedImages
from nas_kd.data.mixing import Mixing
from nas_kd.library.building import LibrarySpec, build_library
from nas_kd.library.library import Library
from nas_kd.preparation.job import TRANSFER_LR
from nas_kd.search.options import parse_options
from nas_kd.search.solver import solve
from nas_kd.training.evaluation import CALIBRATION, evaluate, predict_logits, recalibrate
from nas_kd.training.loop import train
from nas_kd.training.losses import distillation_loss
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import TeacherCache, Teaching, prepare_teacher
from nas_kd.training.views import Views, ViewSpec, build_views

OURS = "ours"
PRUNED = {str(method): method for method in METHODS}
VIEWS = 10  # of every image by default; longer trainings see them again


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training: which arm at which share of the MACs, and how it was trained."""

    arm: str
    share: int
    epochs: int
    lr: float
    space: str = "width,kernel,conv"
    recipe: str = ""  # further fields of it, as JSON
    views: int = VIEWS
    mixing: str = ""  # fields of it, as JSON

    @property
    def name(self) -> str:
        space = "" if self.arm != OURS or self.space == "width,kernel,conv" else f" {self.space}"
        seen = "" if self.views == VIEWS else f" {self.views} views"
        how = f"{self.arm}{space} {self.recipe}".strip() + seen + (self.mixing and f" {self.mixing}")
        return f"{how}, {self.share} %, {self.epochs} epochs at {self.lr:g}"


class Study:
    """What every arm shares, made when it is first needed; rows say what that took."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.rows = arguments, Rows(Path(arguments.rows), arguments)
        self.ground = Ground(arguments, make_ground(arguments, arguments.img_size), Path(arguments.cache))
        self.size = (3, arguments.img_size, arguments.img_size)

    @functools.cached_property
    def teacher(self) -> nn.Module:
        epochs, seed = self.ground.epochs, self.arguments.seed
        recipe = Recipe(epochs=epochs, lr=TRANSFER_LR, distill_weight=0.0, seed=seed)
        teaching = Teaching(recipe=recipe, augmentation=self.ground.augmentation, head="new")
        cache = TeacherCache(folder=self.ground.cache, key=self.arguments.model)
        started = time.process_time()
        network = prepare_teacher(self.ground.network(), self.ground.splits, teaching, cache=cache).network
        if not self.rows.has("teacher"):
            scores = self.ground.scores(network)
            self.rows.add("teacher", {**scores, "cpu_seconds": round(time.process_time() - started)})
        return network

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one study lives as long as the process)
    def views(self, count: int = VIEWS, mixed: str = "") -> Views:
        teacher, started = self.teacher, time.process_time()
        arm = "views" if (count, mixed) == (VIEWS, "") else f"views {count} {mixed}".strip()
        mixing = Mixing(num_classes=self.ground.splits.num_classes, **json.loads(mixed)) if mixed else None
        spec = ViewSpec(count=count, augmentation=self.ground.augmentation, seed=self.arguments.seed, mixing=mixing)
        views = build_views(self.ground.splits.train, teacher, spec, self.ground.cache)
        if not self.rows.has(arm):
            self.rows.add(arm, {"cpu_seconds": round(time.process_time() - started)})
        return views

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one study lives as long as the process)
    def library(self, space_text: str) -> tuple[Space[nn.Module], Library, float]:
        """The space, its library and the CPU-seconds that it took."""
        names = space_text.split(",")
        options = parse_options(",".join(n for n in names if n != "stages"), search_stages="stages" in names)
        teacher, arm = self.teacher, f"library {space_text}"
        space, spec, started = Space(teacher, options=options, img_size=self.size[1]), self._spec(), time.process_time()
        images = AugmentedImages(self.ground.splits.train, self.ground.augmentation, self.arguments.seed)
        library = build_library(
            teacher, space.analysis, images.sample(spec.images + spec.holdout), spec, self.ground.cache
        )
        if not self.rows.has(arm):
            self.rows.add(arm, {"cpu_seconds": round(time.process_time() - started)})
        row = next(row for row in self.rows.rows if self.rows.key(arm).items() <= row.items())
        return space, library, row["cpu_seconds"]

    def _spec(self) -> LibrarySpec:
        return LibrarySpec(seed=self.arguments.seed, anchor=False, rounds=())

    def student(self, run: Run) -> tuple[nn.Module | None, float]:
        """A network to be trained, and the CPU-seconds that came before; None where there is none within the budget."""
        macs = measure(self.teacher, self.size).macs
        budget = Budget((("macs", run.share / 100 * macs),))
        calibration = self.views(run.views, run.mixing).sample(CALIBRATION)
        if run.arm == OURS:
            space, library, before = self.library(run.space)
            started = time.process_time()
            genotype = solve(space.table, budget, library.damages(), seconds=60)
            assert genotype is not None
            student = library.student(genotype)
        else:
            before, started = 0.0, time.process_time()
            student = prune(self.teacher.requires_grad_(True), PRUNED[run.arm], budget, calibration)
        if student is not None:
            recalibrate(student, calibration)
        return student, before + time.process_time() - started

    def run(self, run: Run) -> Scores:
        """The row of a run, measured if it is not there."""
        if not self.rows.has(run.name):
            student, before = self.student(run)
            scores: Scores = {"run": dataclasses.asdict(run), "before": round(before), "val": 0.0, "test": 0.0}
            if student is not None:
                scores |= self._train(student, run)
            self.rows.add(run.name, scores)
        return next(row for row in self.rows.rows if self.rows.key(run.name).items() <= row.items())

    def _train(self, student: nn.Module, run: Run) -> Scores:
        cost, started = measure(student, self.size), time.process_time()
        untrained = evaluate(student, self.ground.splits.val)
        if run.epochs:
            recipe = Recipe(epochs=run.epochs, lr=run.lr, seed=self.arguments.seed, **json.loads(run.recipe or "{}"))
            train(student, self.views(run.views, run.mixing), recipe)
        scores = {"untrained val": untrained, "macs": cost.macs, "params": cost.params}
        scores |= {"cpu_seconds": round(time.process_time() - started), "val KL": self._divergence(student)}
        return {**scores, **self.ground.scores(student)}

    def _divergence(self, student: nn.Module) -> float:
        """KL from the teacher on the validation images: less noisy than accuracy on a few hundred."""
        teacher, own = (predict_logits(network, self.ground.splits.val) for network in (self.teacher, student))
        return float(distillation_loss(own, teacher, temperature=1.0))


def best(rows: list[Scores]) -> Scores:
    """The best by validation."""
    return max(rows, key=lambda row: float(row["val"]))


def planned(arguments: argparse.Namespace, share: int) -> Run:
    """Ours at a share of the MACs, at the first of the rates."""
    mixing = {"mixup": arguments.mixup, "mixup_prob": arguments.mixup_prob} if arguments.mixup else {}
    return Run(
        arm=OURS,
        share=share,
        epochs=arguments.epochs,
        lr=arguments.rates[0],
        space=arguments.space,
        recipe=as_json(dict(arguments.recipe)),
        views=arguments.views,
        mixing=as_json(mixing),
    )


def as_json(fields: dict[str, Any]) -> str:
    """The fields in order; nothing where there are none."""
    return json.dumps(fields, sort_keys=True) if fields else ""


def compare(study: Study) -> None:
    """Ours and torch-pruning's best, each at the rate that is best by validation; last at equal compute."""
    arguments = study.arguments
    for share in arguments.shares:
        plan = planned(arguments, share)
        ours = best([study.run(dataclasses.replace(plan, lr=lr)) for lr in arguments.rates])
        if not arguments.methods:
            continue
        others = [dataclasses.replace(plan, arm=f"torch-pruning {name}") for name in arguments.methods]
        method = best([study.run(run) for run in others])["run"]["arm"]
        theirs = best([study.run(dataclasses.replace(plan, arm=method, lr=lr)) for lr in arguments.rates])
        spared = ours["before"] + ours["cpu_seconds"] - theirs["before"] - theirs["cpu_seconds"]
        more = max(0, round(spared / max(1, theirs["cpu_seconds"] / arguments.epochs)))
        if more:
            rate = theirs["run"]["lr"]
            study.run(dataclasses.replace(plan, arm=method, epochs=arguments.epochs + more, lr=rate))


def page(rows: list[Scores]) -> str:
    """All rows as Markdown, the teacher's first."""
    lines = [
        "| network, px, seed | arm | as assembled: validation | validation | KL there | test | CPU-s before | CPU-s |",
        f"|{'---|' * 8}",
    ]
    for row in rows:
        known = {name: f"{100 * row[name]:.1f}" if name in row else "" for name in ("untrained val", "val", "test")}
        divergence = f"{row['val KL']:.3f}" if "val KL" in row else ""
        cells = (
            f"{row['model']}, {row['img_size']}, {row['seed']}",
            row["arm"],
            *(known["untrained val"], known["val"], divergence, known["test"]),
            *(row.get("before", ""), row["cpu_seconds"]),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def field(text: str) -> tuple[str, Any]:
    """A field of a recipe and its value: a number, or a word."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parser() -> argparse.ArgumentParser:
    """The arguments of this study, and of those that are built on it."""
    own = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = own.add_argument
    add("--page", action="store_true", help="print the page of the rows that are there")
    add("--rows", default="photos.jsonl", help="where the rows are kept (photos.jsonl)")
    add_ground(add)
    add("--cache", default="photos-cache", help="decoded images, teachers, views, libraries (photos-cache)")
    add("--space", default="width,kernel,conv", help="what is open to us; `stages` for residual streams")
    add("--shares", nargs="+", type=int, default=(50, 30), help="of the teacher's MACs, in percent")
    add("--epochs", type=int, default=6)
    add("--rates", nargs="+", type=float, default=(0.005, 0.02, 0.01), help="learning rates")
    add("--views", type=int, default=VIEWS, help=f"of every image ({VIEWS})")
    add("--mixup", type=float, default=0.0, help="mix images, as the product's option of this name does (0)")
    add("--mixup-prob", type=float, default=1.0, help="the share of the images that is mixed (1)")
    add("--recipe", nargs="+", type=field, default=(), metavar="FIELD=VALUE", help="what else a training is told")
    add("--methods", nargs="*", default=("local l2 whole", "local taylor whole", "global taylor inner"))
    return own


def main() -> None:
    arguments = parser().parse_args()
    if arguments.page:
        print(page([json.loads(line) for line in Path(arguments.rows).read_text().splitlines()]))
        return
    if not (arguments.weights and arguments.data_dir):
        parser().error("--weights and --data-dir are needed")
    torch.set_num_threads(1)
    compare(Study(arguments))


if __name__ == "__main__":
    main()
