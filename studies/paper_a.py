"""Paper A's comparison: a base narrowed by structure learning, beside the base itself, one width everywhere, and our
search's own solution, all trained for the same number of images.

    python studies/paper_a.py --smoke                                                 minutes, handwritten digits
    python studies/paper_a.py --short --dataset folder --data-dir DIR --initial-checkpoint FILE    an hour of one core
    python studies/paper_a.py --full --dataset torch/cifar10 --data-dir DIR           a GPU: MobileNetV2 and others

"Compact CNN Structure Learning by Knowledge Distillation" (arXiv 2104.09191), our reconstruction (docs/papers.md), at
its two points: half of the MACs, and 1/5.2 of the params. Every arm begins with the same trained base, which is its
teacher too: `--initial-checkpoint`, or trained here.

- the base, trained on without a teacher
- structure: widths learnt, narrowed, distilled (`python -m nas_kd.structure …`); the images of the learning count
- the same structure from scratch without a teacher, and one width everywhere, distilled (its baselines)
- library: the knapsack solution on the library of block choices, kinds and kernels too, distilled. No trials. Images
  that the library looks at do not count

The test split is looked at once per model. Rows are kept in `rows.jsonl` of the output folder: a killed study goes on
where it was. `--table` prints what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from optuna.storages import InMemoryStorage
from rich.console import Console

from nas_kd.arguments.study import parse_study
from nas_kd.distill import main as distill
from nas_kd.pipeline.job import prepare
from nas_kd.pipeline.materials import gather
from nas_kd.pipeline.models import Wanted, make_models
from nas_kd.pipeline.records import Records
from nas_kd.progress import Stages
from nas_kd.search.solver import solve
from nas_kd.structure import main as learn_structure

Row = dict[str, Any]
BUDGETS = ("macs=50%", "params=19.2%")  # half, and no more than 1/5.2
BASE, LEARNT, UNIFORM, SCRATCH, LIBRARY = (
    "the base, trained on",
    "structure, learnt",
    "one width everywhere",
    "the learnt one from scratch, no teacher",
    "library and knapsack",
)
NAMES = {"front": LEARNT, "uniform": UNIFORM, "no teacher": SCRATCH}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the study is: which bases, their images, how a base is trained first (when no weights are given), and
    how many epochs the learning and the distillation after it take."""

    bases: tuple[str, ...]
    images: str
    first: str
    learn: int
    refine: int
    training: str
    library: float
    seeds: int = 3


SCALES = {
    "smoke": Scale(
        bases=("cifar_resnet20",),
        images="--img-size 16 --train-images 640",
        first="--epochs 8 --lr 0.05 --batch-size 32",
        learn=4,
        refine=4,
        training="--batch-size 32",
        library=0.1,
        seeds=1,
    ),
    "short": Scale(
        bases=("cifar_resnet20",),
        images="--img-size 32 --train-images 2000",
        first="--epochs 30 --lr 0.1 --batch-size 64",
        learn=3,
        refine=3,
        training="--batch-size 32 --amp",
        library=0.25,
        seeds=2,
    ),
    "full": Scale(
        bases=("mobilenetv2_100 --reduction 8", "cifar_resnet56", "cifar_vgg16_bn"),
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
    """A study under way: its scale, its data, weights of the base if there are any, and the folder of everything."""

    scale: Scale
    data: tuple[str, ...]
    weights: str | None
    out: Path

    @property
    def records(self) -> Records:
        return Records(self.out / "rows.jsonl")

    def run(self) -> None:
        """Every row that is missing, seed by seed."""
        for seed in range(self.scale.seeds):
            for base in self.scale.bases:
                weights = self.weights or self.trained(base, seed)
                start = [
                    *base.split(),
                    "--initial-checkpoint",
                    weights,
                    *self.images(seed),
                    *self.scale.training.split(),
                ]
                self.row(base, "", BASE, [*start, "--no-teacher", "--epochs", str(self.epochs)], seed)
                for budget in BUDGETS:
                    arguments = ["--model", *start, "--budget", budget]
                    self.row(base, budget, LEARNT, [*arguments, *self.split_epochs()], seed)
                    self.row(base, budget, LIBRARY, [*arguments, *self.whole_epochs()], seed)

    @property
    def epochs(self) -> int:
        """How many each arm trains for."""
        return self.scale.learn + self.scale.refine

    def split_epochs(self) -> list[str]:
        return ["--learn-epochs", str(self.scale.learn), "--refine-epochs", str(self.scale.refine)]

    def whole_epochs(self) -> list[str]:
        return ["--refine-epochs", str(self.epochs), "--library-budget", str(self.scale.library)]

    def images(self, seed: int) -> list[str]:
        return [*self.scale.images.split(), *self.data, "--seed", str(seed)]

    def trained(self, base: str, seed: int) -> str:
        """The weights of a base that is trained here."""
        arguments = [*base.split(), "--no-teacher", *self.scale.first.split(), *self.images(seed)]
        self.row(base, "", "the base", arguments, seed)
        (row,) = self.records[shlex.join(arguments)]["rows"]
        return str(Path(row["path"]) / "model.safetensors")

    def row(self, base: str, budget: str, arm: str, arguments: list[str], seed: int) -> None:
        """What one command gives, unless it is there already."""
        key = shlex.join(arguments)
        if key in self.records:
            return
        shared = "" if arm == LIBRARY else budget  # one library for all budgets
        name = "-".join((base, shared, arm, str(seed))).translate(str.maketrans(" =%,", "----"))
        out = self.out / name
        sys.stderr.write(f"{datetime.datetime.now():%H:%M} {arm}: {key}\n")
        started, clock = time.process_time(), time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):  # the tables of single models
            rows = MAKERS[arm](arguments, out, self.out / "cache")
        facts = {"base": base, "budget": budget, "seed": seed, "seconds": round(time.process_time() - started, 1)}
        wall = round(time.monotonic() - clock, 1)
        self.records[key] = {"rows": [{"arm": arm, **facts, **row} for row in rows], "wall": wall}


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
    materials = gather(job, stages)
    genotype = solve(job.space.table, job.budget, job.space.damages(), seconds=60)
    assert genotype is not None
    assert settings.refine_epochs is not None
    wanted = Wanted(role="front", genotype=genotype, space=job.space, epochs=settings.refine_epochs)
    _, model = make_models(job, [wanted], materials, stages)
    accuracy = {"test accuracy": model.test_accuracy, "path": str(out / str(model.path))}
    return [{"params": model.cost.params, "macs": model.cost.macs, **accuracy}]


MAKERS = {"the base": trained_base, BASE: trained_base, LEARNT: learnt_structure, LIBRARY: knapsack}


def finish(code: int) -> None:
    if code:
        sys.exit(code)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Means and standard deviations over the seeds, and how far above the base that was trained on."""
    yield "| base | budget | model | params | MACs | test accuracy % | over the base | seeds |"
    yield "|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["base"], row["budget"], row["arm"]), []).append(row)
    for (base, budget, arm), group in groups.items():
        reference = {row["seed"]: row["test accuracy"] for row in groups.get((base, "", BASE), ())}
        scores = [100 * row["test accuracy"] for row in group]
        gains = [100 * (row["test accuracy"] - reference[row["seed"]]) for row in group if row["seed"] in reference]
        gain = "" if arm == BASE or not gains else spread(gains, "+.2f")
        costs = f"{max(row['params'] for row in group):,} | {max(row['macs'] for row in group):,}"
        yield f"| {base} | {budget} | {arm} | {costs} | {spread(scores, '.2f')} | {gain} | {len(group)} |"


def spread(values: Sequence[float], form: str) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def header(study: Study, size: str, seconds: float) -> Iterator[str]:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"one of {os.cpu_count()} CPU cores"
    dataset = study.data[study.data.index("--dataset") + 1] if "--dataset" in study.data else "digits"
    given = f" --initial-checkpoint {Path(study.weights).name}" if study.weights else ""
    yield "# Paper A: structure learning beside the base, one width, and the library\n"
    yield (
        f"`python studies/paper_a.py --{size} --dataset {dataset}{given}`, {datetime.date.today()}, "
        f"{platform.machine()}, {where}, torch {torch.__version__}, timm {timm.__version__}; {seconds:,.0f} s.\n"
    )
    scale = study.scale
    yield (
        f"Images: `{scale.images}`. Every model trains for {study.epochs} epochs (`{scale.training}`) from the same "
        f"trained base, of which the learnt structure spends {scale.learn} on its widths; the one from scratch draws "
        "new weights. Means and standard deviations over the seeds, of costs the largest. Test accuracy, looked at "
        "once per model.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    for name in SCALES:
        size.add_argument(f"--{name}", action="store_const", const=name, dest="size")
    parser.add_argument("--dataset", help="as for nas_kd.study (digits)")
    parser.add_argument("--data-dir", help="where the data lies")
    parser.add_argument("--initial-checkpoint", help="weights of the base, where there is one base (trained here)")
    parser.add_argument("--out", type=Path, help="output folder (results/paper_a-SIZE)")
    parser.add_argument("--table", action="store_true", help="print what there is, and train nothing")
    arguments = parser.parse_args()
    given = [("--dataset", arguments.dataset), ("--data-dir", arguments.data_dir)]
    data = tuple(word for name, value in given if value is not None for word in (name, value))
    out = arguments.out or Path("results", f"paper_a-{arguments.size}")
    out.mkdir(parents=True, exist_ok=True)
    study = Study(scale=SCALES[arguments.size], data=data, weights=arguments.initial_checkpoint, out=out)
    if not arguments.table:
        study.run()
    lines = [json.loads(line)["record"] for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for record in lines for row in record["rows"]]
    for line in (*header(study, arguments.size, sum(record["wall"] for record in lines)), *table(rows)):
        print(line)


if __name__ == "__main__":
    main()
