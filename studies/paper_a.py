"""Paper A's comparison: a base narrowed by structure learning, beside the base itself, one width everywhere, and our
search's own solution, all trained for the same number of images.

    python studies/paper_a.py --smoke                                                 minutes, handwritten digits
    python studies/paper_a.py --short --dataset folder --data-dir DIR --dataset torch/fashion_mnist --data-dir DIR2
    python studies/paper_a.py --quarter --dataset torch/cifar10 --data-dir DIR        minutes of a GPU: studies/gpu.py
    python studies/paper_a.py --full --dataset torch/cifar10 --data-dir DIR           a GPU: MobileNetV2 and others

"Compact CNN Structure Learning by Knowledge Distillation" (arXiv 2104.09191), our reconstruction (docs/papers.md), at
its two points: half of the MACs, and 1/5.2 of the params. Every arm begins with the same trained base, which is its
teacher too: trained here, or by `--initial-checkpoint` elsewhere.

There are two baselines. *The base*, trained from scratch until it has converged on its images: what the abstract
speaks of, and what a user has. *The base, trained on* from there without a teacher for as many images as the students
see after it: the fair one, since then base and student come of equally many images, and a student's gain cannot be
that of longer training.

- structure: widths learnt, narrowed, distilled (`python -m nas_kd.structure …`); the images of the learning count
- the same structure from scratch without a teacher, and one width everywhere, distilled (not in the short form)
- library (neither there): the knapsack solution on the library of block choices, kinds and kernels too,
  distilled. No trials. Images that the library looks at do not count

The short form keeps the regime of the claim, a base with far more parameters than its images need, at a CPU's price:
small images, few of them, seen often. The test split is looked at once per model and chooses nothing. Rows are kept in
`rows.jsonl` of the output folder: a killed study goes on where it was. `--table` prints what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.storages import InMemoryStorage
from paper_tables import Dataset, add_datasets, datasets_of, hardware, spread
from rich.console import Console

from nas_kd.arguments.study import parse_study
from nas_kd.distill import main as distill
from nas_kd.files.records import Records
from nas_kd.pipeline.baselines import WantedModel
from nas_kd.pipeline.models import make_models
from nas_kd.preparation.job import prepare
from nas_kd.preparation.materials import gather
from nas_kd.progress import Stages
from nas_kd.search.solver import solve
from nas_kd.structure import main as learn_structure

Row = dict[str, Any]
BUDGETS = {  # half, and no more than 1/5.2; there the blocks' own widths do not suffice
    "macs=50%": (),
    "params=19.2%": ("--search-stages",),
}
FIRST, BASE, LEARNT, UNIFORM, SCRATCH, LIBRARY = (
    "the base",
    "the base, trained on",
    "structure, learnt",
    "one width everywhere",
    "the learnt one from scratch, no teacher",
    "library and knapsack",
)
NAMES = {"front": LEARNT, "uniform": UNIFORM, "no teacher": SCRATCH}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the study is: the bases, each with what is its own in all trainings of it and its students; images; how
    a base is trained first (when no weights are given), how many epochs the learning and the distillation after it
    take, and further options of the structure command. Without a share of work for the library it has no arm."""

    bases: dict[str, str]
    images: str
    first: str
    learn: int
    refine: int
    training: str
    library: float | None = None
    options: str = ""
    seeds: int = 3


SCALES = {
    "smoke": Scale(
        bases={"cifar_resnet20": "--batch-size 32"},
        images="--img-size 16 --train-images 640",
        first="--epochs 8 --lr 0.05",
        learn=4,
        refine=4,
        training="",
        library=0.1,
        seeds=1,
    ),
    "short": Scale(
        bases={
            "cifar_resnet20": "--lr 0.1 --amp",
            "mobilenetv2_100 --reduction 8": "--lr 0.02",
            "regnetx_002 --reduction 16": "--lr 0.05",
        },
        images="--img-size 16 --train-images 4000 --val-fraction 0.25 --batch-size 32",
        first="--epochs 40",
        learn=10,
        refine=30,
        training="--views 40",
        options="--no-baselines",
        seeds=2,
    ),
    "quarter": Scale(  # of an hour on a GPU, studies/gpu.py
        bases={"mobilenetv2_100 --reduction 8": ""},
        images="--img-size 32 --val-fraction 0.1 --workers 8",
        first="--epochs 40 --lr 0.1 --batch-size 256 --amp",
        learn=6,
        refine=24,
        training="--batch-size 256 --amp --views 15",
        options="--no-baselines",
        seeds=1,
    ),
    "full": Scale(
        bases={"mobilenetv2_100 --reduction 8": "", "cifar_resnet56": "", "cifar_vgg16_bn": ""},
        images="--img-size 32",
        first="--epochs 300 --lr 0.1 --schedule step --weight-decay 2e-4 --batch-size 128 --amp",
        learn=60,
        refine=240,
        training="--batch-size 128 --amp --views 30",
        library=0.25,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study under way: its scale, its datasets, weights of the base if there are any, and its folder."""

    scale: Scale
    datasets: tuple[Dataset, ...]
    weights: str | None
    out: Path

    def run(self) -> None:
        """Every row that is missing, seed by seed."""
        for seed in range(self.scale.seeds):
            for base in self.scale.bases:
                for data in self.datasets:
                    self.compare(data, base, seed)

    def compare(self, data: Dataset, base: str, seed: int) -> None:
        """The rows of one base on one dataset."""
        what = {"dataset": data.name, "base": base, "seed": seed}
        images = [*self.scale.images.split(), *data.arguments, *self.scale.bases[base].split(), "--seed", str(seed)]
        model, weights = self.start(what, images)
        rest = [*weights, *images, *self.scale.training.split()]
        own = [word for word in rest if word != "--pretrained"]  # the distill command takes a folder with its weights
        for budget, options in BUDGETS.items():
            arguments = ["--model", *model, *rest, "--budget", budget, *options, *self.scale.options.split()]
            self.row({**what, "budget": budget}, LEARNT, [*arguments, *self.split_epochs()])
            if self.scale.library is not None:
                self.row({**what, "budget": budget}, LIBRARY, [*arguments, *self.whole_epochs()])
        self.row({**what, "budget": ""}, BASE, [*model, *own, "--no-teacher", "--epochs", str(self.epochs)])

    def start(self, what: Row, images: Sequence[str]) -> tuple[list[str], list[str]]:
        """The base and its weights, as arguments. One that is trained here is its folder, which knows how its images
        are normalised."""
        if self.weights is not None:
            return what["base"].split(), ["--initial-checkpoint", self.weights]
        arguments = [*what["base"].split(), "--no-teacher", *self.scale.first.split(), *images]
        (row,) = self.row({**what, "budget": ""}, FIRST, arguments)
        return [f"local-dir:{row['path']}"], ["--pretrained"]

    @property
    def epochs(self) -> int:
        """How many each arm trains for."""
        return self.scale.learn + self.scale.refine

    def split_epochs(self) -> list[str]:
        return ["--learn-epochs", str(self.scale.learn), "--refine-epochs", str(self.scale.refine)]

    def whole_epochs(self) -> list[str]:
        return ["--refine-epochs", str(self.epochs), "--library-budget", str(self.scale.library)]

    def row(self, what: Row, arm: str, arguments: list[str]) -> list[Row]:
        """What one command gives, from the file or run now."""
        records, key = Records(self.out / "rows.jsonl"), shlex.join(arguments)
        if key not in records:
            shared = {**what, "budget": ""} if arm == LIBRARY else what  # one library for all budgets
            name = "-".join(map(str, (*shared.values(), arm))).translate(str.maketrans(" =%,", "----"))
            sys.stderr.write(f"{datetime.datetime.now():%H:%M} {arm}: {key}\n")
            started = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):  # the tables of single models
                rows = MAKERS[arm](arguments, self.out / name, self.out / "cache")
            seconds = round(time.process_time() - started, 1)
            records[key] = {"rows": [{"arm": arm, **what, "seconds": seconds, **row} for row in rows]}
        found: list[Row] = records[key]["rows"]
        return found


def trained_base(arguments: list[str], out: Path, cache: Path) -> list[Row]:
    """The base itself, by the distill command."""
    finish(distill([*arguments, "-q", "--out", str(out), "--cache", str(cache)]))
    row = json.loads((out / "distill.json").read_text(encoding="utf-8"))
    return [{name: row[name] for name in ("params", "macs", "test accuracy")} | {"path": str(out / row["path"])}]


def learnt_structure(arguments: list[str], out: Path, cache: Path) -> list[Row]:
    """The learnt structure and its baselines, by the structure command."""
    finish(learn_structure([*arguments, "-q", "--out", str(out)]))
    found = csv.DictReader((out / "front.csv").open(encoding="utf-8"))
    return [table_row(row, NAMES[row["role"]], out) for row in found if row["role"] in NAMES]


def table_row(row: Row, arm: str, out: Path) -> Row:
    costs = {"params": int(row["params"]), "macs": int(row["macs"])}
    return {"arm": arm, **costs, "test accuracy": float(row["test_accuracy"]), "path": str(out / row["path"])}


def knapsack(arguments: list[str], out: Path, cache: Path) -> list[Row]:
    """The genotype of least damage by the library, with its weights: where our search begins."""
    settings = parse_study([*arguments, "--front", "1", "--proxy-epochs", "1", "-q", "--out", str(out)])
    job, stages = prepare(settings, InMemoryStorage()), Stages(Console(stderr=True), quiet=True)
    job, materials = gather(job, stages)
    genotype = solve(job.space.table, job.budget, job.space.damages(), seconds=60)
    assert genotype is not None
    assert settings.refinement.epochs is not None
    wanted = WantedModel(role="front", genotype=genotype, space=job.space, epochs=settings.refinement.epochs)
    _, model = make_models(job, [wanted], materials, stages)
    accuracy = {"test accuracy": model.test_accuracy, "path": str(out / str(model.path))}
    return [{"params": model.cost.params, "macs": model.cost.macs, **accuracy}]


MAKERS = {FIRST: trained_base, BASE: trained_base, LEARNT: learnt_structure, LIBRARY: knapsack}


def finish(code: int) -> None:
    if code:
        sys.exit(code)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Means and standard deviations over the seeds, and how far above each of the two baselines."""
    yield "| dataset | base | budget | model | params | MACs | test % | over the base | over it, trained on | seeds |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("dataset", "base", "budget", "arm")), []).append(row)
    for (dataset, base, budget, arm), group in groups.items():
        baselines = [groups.get((dataset, base, "", name), []) for name in (FIRST, BASE)]
        gains = " | ".join("" if arm in (FIRST, BASE) else gain(group, baseline) for baseline in baselines)
        costs = f"{max(row['params'] for row in group):,} | {max(row['macs'] for row in group):,}"
        scores = spread([100 * row["test accuracy"] for row in group])
        name = base.partition(" ")[0]
        yield f"| {dataset} | {name} | {budget} | {arm} | {costs} | {scores} | {gains} | {len(group)} |"


def gain(group: Sequence[Row], baseline: Sequence[Row]) -> str:
    """How far a group is above its baseline, seed by seed."""
    reference = {row["seed"]: row["test accuracy"] for row in baseline}
    gains = [100 * (row["test accuracy"] - reference[row["seed"]]) for row in group if row["seed"] in reference]
    return spread(gains, "+.2f") if gains else ""


def header(study: Study, size: str, seconds: float) -> Iterator[str]:
    names = ", ".join(data.name for data in study.datasets)
    given = f" --initial-checkpoint {Path(study.weights).name}" if study.weights else ""
    scale = study.scale
    yield "# Paper A: structure learning beside the base, one width, and the library\n"
    yield (
        f"`python studies/paper_a.py --{size}{given} …` on {names}, {datetime.date.today()}, {hardware()}; "
        f"{seconds:,.0f} s of CPU.\n"
    )
    first = "comes from elsewhere" if study.weights else f"is trained from scratch by `{scale.first}`"
    bases = ", ".join(f"`{base}`" + f" (`{own}`)" * bool(own) for base, own in scale.bases.items())
    yield (
        f"Images: `{scale.images}`. The base ({bases}) {first}. Every other "
        f"model trains for {study.epochs} epochs more (`{scale.training}`) from there, of which the learnt structure "
        f"(`python -m nas_kd.structure … {scale.options}`, for the params with `--search-stages`) spends "
        f"{scale.learn} on its widths; one from scratch draws new weights. Means and standard deviations over the "
        "seeds (from 0), of costs the largest. Test accuracy, looked at once per model.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    for name in SCALES:
        size.add_argument(f"--{name}", action="store_const", const=name, dest="size")
    add_datasets(parser)
    parser.add_argument("--initial-checkpoint", help="weights of the base, where there is one base (trained here)")
    parser.add_argument("--out", type=Path, help="output folder (results/paper_a-SIZE)")
    parser.add_argument("--table", action="store_true", help="print what there is, and train nothing")
    arguments = parser.parse_args()
    out = arguments.out or Path("results", f"paper_a-{arguments.size}")
    out.mkdir(parents=True, exist_ok=True)
    datasets = datasets_of(arguments)
    study = Study(scale=SCALES[arguments.size], datasets=datasets, weights=arguments.initial_checkpoint, out=out)
    if not arguments.table:
        study.run()
    made = [record["rows"] for record in Records(out / "rows.jsonl").values()]
    seconds = sum(rows[0]["seconds"] for rows in made)
    ordered = sorted((row for rows in made for row in rows), key=lambda row: (row["base"], row["dataset"]))
    for line in (*header(study, arguments.size, seconds), *table(ordered)):
        print(line)


if __name__ == "__main__":
    main()
