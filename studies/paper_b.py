"""Paper B's comparison: each cheap convolution trained directly, beside a finished teacher, and online with its peers;
and what our search finds within the same params and MACs.

    python studies/paper_b.py --smoke                                                minutes, handwritten digits
    python studies/paper_b.py --short --dataset folder --data-dir DIR > docs/results/paper_b.md     hours on a CPU
    python studies/paper_b.py --full --dataset torch/cifar10 --data-dir DIR           a GPU: the paper's own recipe

"Compressing CNNs with cheap convolutions and online distillation" (arXiv 1909.13063). Every model is one command,
`python -m nas_kd.distill …` or `python -m nas_kd.study …`, kept in `rows.jsonl` of the output folder: a killed study
goes on where it was. The teacher of offline distillation and of the search is the standard form of the same seed,
trained here. The test split is looked at once per model; online, the student is chosen on validation images. All models
of a seed see the same number of images in their own training.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from nas_kd.distill import main as distill
from nas_kd.pipeline.records import Records
from nas_kd.study import main as search

Row = dict[str, Any]
Command = Callable[[Sequence[str]], int]
CONVS = ("depthwise", "shift", "group4")
AUTHORS_FORM = ("cifar_resnet20_cheap", "cifar_resnet56_cheap")  # their kind is an argument of the model
METHODS = {
    "direct": "--no-teacher",
    "offline KD": "--teacher {teacher}",
    "online": "--online --peers {peers}",
}
SEARCH = "our search"
PAPER = "--epochs 300 --batch-size 128 --lr 0.1 --schedule step --weight-decay 2e-4 --views 0 --amp"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the study is: which bases with which cheap forms, and how each model is trained. A search gets the
    params and MACs of each form in `searched` as its budget."""

    bases: dict[str, tuple[str, ...]]
    images: str
    training: str
    search: str
    searched: tuple[str, ...]
    seeds: int = 3
    peers: int = 4


SCALES = {
    "smoke": Scale(
        bases={"cifar_resnet20_cheap": CONVS[:2]},
        images="--img-size 16 --train-images 800",
        training="--epochs 6 --lr 0.1 --batch-size 32",
        search="--trials 2 --proxy-epochs 1 --refine-epochs 6 --batch-size 32",
        searched=("depthwise",),
        seeds=2,
        peers=2,
    ),
    "short": Scale(
        bases={"cifar_resnet20_cheap": CONVS},
        images="--img-size 32 --train-images 5000",
        training="--epochs 12 --lr 0.1 --batch-size 64 --weight-decay 2e-4 --views 12",
        search="--trials 8 --proxy-epochs 2 --refine-epochs 12 --batch-size 64 --views 12",
        searched=("depthwise",),
    ),
    "full": Scale(
        bases={"cifar_resnet56_cheap": CONVS, "cifar_vgg16_bn": CONVS, "mobilenetv2_100 --reduction 8": ("shift",)},
        images="--img-size 32",
        training="--epochs 300 --batch-size 128 --lr 0.1 --schedule step --weight-decay 2e-4 --views 0 --amp",
        search="--trials 30 --refine-epochs 300 --batch-size 128 --views 30 --amp",
        searched=CONVS,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study under way: its scale, its data, and the folder that keeps everything."""

    scale: Scale
    data: tuple[str, ...]
    out: Path

    def rows(self) -> Iterator[Row]:
        """Every row of the study, seed by seed."""
        for seed in range(self.scale.seeds):
            for base, convs in self.scale.bases.items():
                yield self.train(base, "standard", "direct", seed)
                for conv in convs:
                    yield from (self.train(base, conv, method, seed) for method in METHODS)
                    if conv in self.scale.searched:
                        yield self.search(base, conv, seed)

    def train(self, base: str, conv: str, method: str, seed: int) -> Row:
        """One model of a given form."""
        teacher = self.train(base, "standard", "direct", seed)["path"] if method == "offline KD" else ""
        how = METHODS[method].format(teacher=teacher, peers=self.scale.peers).split()
        arguments = [*model_arguments(base, conv), *how, *self.scale.training.split()]
        return self.row(distill, arguments, base=base, conv=conv, method=method, seed=seed)

    def search(self, base: str, conv: str, seed: int) -> Row:
        """The model that a search finds within the params and MACs of this form."""
        form, teacher = self.train(base, conv, "direct", seed), self.train(base, "standard", "direct", seed)
        weights = str(Path(teacher["path"]) / "model.safetensors")
        budget = f"params={form['params']},macs={form['macs']}"
        arguments = ["--model", *base.split(), "--initial-checkpoint", weights, "--budget", budget, "--front", "1"]
        arguments += self.scale.search.split()
        return self.row(search, arguments, base=base, conv=conv, method=SEARCH, seed=seed)

    def row(self, command: Command, arguments: list[str], *, seed: int, **what: str) -> Row:
        """What the command gives, from the file or run now."""
        arguments = [*arguments, *self.scale.images.split(), *self.data, "--seed", str(seed)]
        records, key = Records(self.out / "rows.jsonl"), shlex.join(arguments)
        if key in records:
            return records[key]
        out = self.out / "-".join([*what.values(), str(seed)]).replace(" ", "-")
        sys.stderr.write(f"{key}\n")
        started = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):  # the tables of single models
            code = command(
                [*arguments, "--out", str(out), *(["--cache", str(self.out / "cache")] * (command is distill))]
            )
        if code:
            sys.exit(code)
        result = found(out)
        records[key] = {**what, "seed": seed, **result, "seconds": round(time.monotonic() - started, 1)}
        return records[key]


def found(out: Path) -> Row:
    """What a command left in its folder: of a search the only model of the front."""
    if (out / "distill.json").exists():
        row = json.loads((out / "distill.json").read_text(encoding="utf-8"))
        test = row["test accuracy"]
    else:
        (row,) = (row for row in csv.DictReader((out / "front.csv").open(encoding="utf-8")) if row["role"] == "front")
        test = row["test_accuracy"]
    path = str(out / row["path"])
    return {"params": int(row["params"]), "macs": int(row["macs"]), "test accuracy": float(test), "path": path}


def model_arguments(base: str, conv: str) -> list[str]:
    """A base in the form of this kind of convolution: the authors' own networks, or any timm model by `--conv`."""
    if base in AUTHORS_FORM:
        return [base, "--model-kwargs", f"conv={conv}"]
    return [*base.split(), *([] if conv == "standard" else ["--conv", conv])]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Means and standard deviations over the seeds, and how far above direct training."""
    yield "| base | convolution | training | params | MACs | test accuracy % | over direct | s |"
    yield "|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["base"], row["conv"], row["method"]), []).append(row)
    for (base, conv, method), group in groups.items():
        scores = [100 * row["test accuracy"] for row in group]
        direct = [100 * row["test accuracy"] for row in groups[base, conv, "direct"]]
        gains = [score - other for score, other in zip(scores, direct, strict=True)]
        gain = "" if method == "direct" else f"{mean(gains)}"
        seconds = statistics.mean(row["seconds"] for row in group)
        cost = f"{max(row['params'] for row in group):,} | {max(row['macs'] for row in group):,}"
        yield f"| {base} | {conv} | {method} | {cost} | {mean(scores)} | {gain} | {seconds:.0f} |"


def mean(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def header(study: Study, size: str) -> Iterator[str]:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    yield "# Paper B: cheap convolutions, direct, offline and online\n"
    dataset = study.data[study.data.index("--dataset") + 1] if "--dataset" in study.data else "digits"
    yield (
        f"`python studies/paper_b.py --{size} --dataset {dataset}`, seeds 0–{study.scale.seeds - 1}, "
        f"{datetime.date.today()}, {platform.machine()}, {where}, torch {torch.__version__}, timm {timm.__version__}.\n"
    )
    scale = study.scale
    yield (
        f"Each model: `python -m nas_kd.distill … {scale.training}`, online with {scale.peers} peers; images: "
        f"`{scale.images}`. Search: `python -m nas_kd.study … {scale.search}`, within the params and MACs of the form "
        'that it stands beside. Means and standard deviations over the seeds, of costs the largest; "over direct" '
        "compares the same seeds. s: seconds of one model without its teacher; online of all peers, a search with its "
        "trials and baselines.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    for name in SCALES:
        size.add_argument(f"--{name}", action="store_const", const=name, dest="size")
    parser.add_argument("--dataset", help="as for nas_kd.distill (digits)")
    parser.add_argument("--data-dir", help="where the data lies")
    parser.add_argument("--out", type=Path, help="output folder (results/paper_b-SIZE)")
    arguments = parser.parse_args()
    given = [("--dataset", arguments.dataset), ("--data-dir", arguments.data_dir)]
    data = tuple(word for name, value in given if value is not None for word in (name, value))
    out = arguments.out or Path("results", f"paper_b-{arguments.size}")
    out.mkdir(parents=True, exist_ok=True)
    study = Study(scale=SCALES[arguments.size], data=data, out=out)
    rows = list(study.rows())
    for line in (*header(study, arguments.size), *table(rows)):
        print(line)


if __name__ == "__main__":
    main()
