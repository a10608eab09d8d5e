"""Paper B's comparison: each cheap convolution trained directly, beside a finished teacher, and online with its peers;
and what our search finds within the same params and MACs.

    python studies/paper_b.py --smoke                                                minutes, handwritten digits
    python studies/paper_b.py --short --dataset folder --data-dir DIR         under an hour of one core
    python studies/paper_b.py --few --dataset folder --data-dir DIR            an hour of one core, five seeds
    python studies/paper_b.py --quarter --dataset torch/cifar10 --data-dir DIR        minutes of a GPU: studies/gpu.py
    python studies/paper_b.py --full --dataset torch/cifar10 --data-dir DIR           a GPU: the paper's own recipe

"Compressing CNNs with cheap convolutions and online distillation" (arXiv 1909.13063). Every model is one command,
`python -m nas_kd.distill …` or `python -m nas_kd.study …`, kept in `rows.jsonl` of the output folder: a killed study
goes on where it was. The teacher of offline distillation and of the search is the standard form of the same seed,
trained here. The test split is looked at once per model; online, the student is chosen on validation images. All models
of a seed see the same number of images in their own training. `--table` prints what there is.

The short form is of the regime in which distillation matters, not of the paper's size: few images, seen so often that a
network overfits them, and as many to validate on. It was chosen on validation images of another seed
(docs/results/paper_b.md). `--few` has an eighth of the images, so that seeds enough to tell a gain
from chance can be had.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_tables import Dataset, add_datasets, datasets_of, hardware, spread

from nas_kd.distill import main as distill
from nas_kd.files.records import Records
from nas_kd.study import main as search

Row = dict[str, Any]
Command = Callable[[Sequence[str]], int]
CONVS = ("depthwise", "group4", "shift")
AUTHORS_FORM = ("cifar_resnet20_cheap", "cifar_resnet56_cheap")  # their kind is an argument of the model
METHODS = {
    "direct": "--no-teacher",
    "offline KD": "--teacher {teacher}",
    "online": "--online --peers {peers}",
}
SEARCH = "our search"


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
        images="--img-size 16 --train-images 4000 --val-fraction 0.25",
        training="--epochs 50 --lr 0.1 --batch-size 32 --amp --views 50",
        search="--trials 4 --proxy-epochs 1 --refine-epochs 50 --batch-size 32 --amp --lr 0.1 --views 50",
        searched=("depthwise",),
        seeds=3,
        peers=3,
    ),
    "few": Scale(
        bases={"cifar_resnet20_cheap": CONVS},
        images="--img-size 16 --train-images 500",
        training="--epochs 100 --lr 0.1 --batch-size 32 --amp --views 100",
        search="",
        searched=(),
        seeds=5,
        peers=3,
    ),
    "quarter": Scale(  # of an hour on a GPU, studies/gpu.py
        bases={"cifar_resnet56_cheap": CONVS},
        images="--img-size 32 --val-fraction 0.1 --workers 8",
        training="--epochs 30 --batch-size 256 --lr 0.2 --weight-decay 2e-4 --views 15 --amp",
        search="",
        searched=(),
        seeds=1,
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
    """A study under way: its scale, its datasets, and the folder that keeps everything."""

    scale: Scale
    datasets: tuple[Dataset, ...]
    out: Path
    dry: bool = False  # only what is there already

    def rows(self) -> list[Row]:
        """Every row of the study, what the paper compares first: a study that is cut short has whole seeds of it."""
        made = []
        for methods in (("direct", "online"), ("offline KD", SEARCH)):
            for seed, data in itertools.product(range(self.scale.seeds), self.datasets):
                for base, convs in self.scale.bases.items():
                    what = {"dataset": data.name, "base": base}
                    for conv, method in itertools.product(("standard", *convs), methods):
                        made.append(self.make(data, {**what, "conv": conv, "method": method}, seed))
        return sorted((row for row in made if row is not None), key=_place)

    def make(self, data: Dataset, what: dict[str, str], seed: int) -> Row | None:
        """One row, None where there is none to be or it is not there yet."""
        conv, method = what["conv"], what["method"]
        if method == "direct" or (method == "online" and conv != "standard"):
            return self.train(data, what, seed)
        standard = self.train(data, {**what, "conv": "standard", "method": "direct"}, seed)
        if conv == "standard" or standard is None:
            return None
        if method == "offline KD":
            return self.train(data, what, seed, standard["path"])
        direct = self.train(data, {**what, "method": "direct"}, seed)
        return self.search(data, what, seed, standard, direct) if direct and conv in self.scale.searched else None

    def train(self, data: Dataset, what: dict[str, str], seed: int, teacher: str = "") -> Row | None:
        """One model of a given form."""
        how = METHODS[what["method"]].format(teacher=teacher, peers=self.scale.peers).split()
        arguments = [*model_arguments(what["base"], what["conv"]), *how, *self.scale.training.split()]
        return self.row(distill, arguments, data, what, seed)

    def search(self, data: Dataset, what: dict[str, str], seed: int, standard: Row, form: Row) -> Row | None:
        """The model that a search finds within the params and MACs of this form."""
        budget = f"params={form['params']},macs={form['macs']}"
        arguments = ["--model", f"local-dir:{standard['path']}", "--pretrained", "--budget", budget]
        return self.row(search, [*arguments, "--front", "1", *self.scale.search.split()], data, what, seed)

    def row(self, command: Command, given: list[str], data: Dataset, what: dict[str, str], seed: int) -> Row | None:
        """What the command gives, from the file or run now."""
        arguments = [*given, *self.scale.images.split(), *data.arguments, "--seed", str(seed)]
        records, key = Records(self.out / "rows.jsonl"), shlex.join(arguments)
        if key in records or self.dry:
            return records[key] if key in records else None
        out = self.out / "-".join([*what.values(), str(seed)]).replace(" ", "-")
        sys.stderr.write(f"{datetime.datetime.now():%H:%M} {key}\n")
        started = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):  # the tables of single models
            code = command(
                [*arguments, "-q", "--out", str(out), *(["--cache", str(self.out / "cache")] * (command is distill))]
            )
        if code:
            sys.exit(code)
        result = found(out)
        records[key] = {**what, "seed": seed, **result, "seconds": round(time.process_time() - started, 1)}
        return records[key]


def _place(row: Row) -> tuple[Any, ...]:
    """Where a row stands in the table."""
    order = (*METHODS, SEARCH)
    return row["dataset"], row["base"], ("standard", *CONVS).index(row["conv"]), order.index(row["method"]), row["seed"]


def found(out: Path) -> Row:
    """What a command left in its folder: of a search the only model of the front."""
    if (out / "distill.json").exists():
        row = json.loads((out / "distill.json").read_text(encoding="utf-8"))
        test = row["test accuracy"]
    else:
        (row,) = (row for row in csv.DictReader((out / "front.csv").open(encoding="utf-8")) if row["role"] == "front")
        test = row["test_accuracy"]
    path = str(out / row["path"])
    peers = {"peers": [peer["test accuracy"] for peer in row["peers"]]} if row.get("peers") else {}
    return {"params": int(row["params"]), "macs": int(row["macs"]), "test accuracy": float(test), "path": path, **peers}


def model_arguments(base: str, conv: str) -> list[str]:
    """A base in the form of this kind of convolution: the authors' own networks, or any timm model by `--conv`."""
    if base in AUTHORS_FORM:
        return [base, "--model-kwargs", f"conv={conv}"]
    return [*base.split(), *([] if conv == "standard" else ["--conv", conv])]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Means and standard deviations over the seeds, and how far above direct training."""
    yield "| dataset | base | convolution | training | params | MACs | test % | over direct | all peers % | seeds | s |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("dataset", "base", "conv", "method")), []).append(row)
    for (*form, method), group in groups.items():
        direct = {row["seed"]: row["test accuracy"] for row in groups.get((*form, "direct"), ())}
        gains = [100 * (row["test accuracy"] - direct[row["seed"]]) for row in group if row["seed"] in direct]
        gain = "" if method == "direct" or not gains else spread(gains, "+.2f")
        seconds = statistics.mean(row["seconds"] for row in group)
        cost = f"{max(row['params'] for row in group):,} | {max(row['macs'] for row in group):,}"
        scores = spread([100 * row["test accuracy"] for row in group])
        peers = [100 * accuracy for row in group for accuracy in row.get("peers", ())]
        numbers = f"{scores} | {gain} | {spread(peers) if peers else ''} | {len(group)} | {seconds:.0f}"
        yield f"| {' | '.join((*form, method))} | {cost} | {numbers} |"


def header(study: Study, size: str) -> Iterator[str]:
    scale, names = study.scale, ", ".join(data.name for data in study.datasets)
    yield "# Paper B: cheap convolutions, direct, offline and online\n"
    yield f"`python studies/paper_b.py --{size} …` on {names}, {datetime.date.today()}, {hardware()}.\n"
    yield (
        f"Each model: `python -m nas_kd.distill … {scale.training}`, online with {scale.peers} peers; images: "
        f"`{scale.images}`. "
    )
    if scale.searched:
        yield f"Search: `python -m nas_kd.study … {scale.search}`, within the params and MACs of the form beside it. "
    yield (
        "Seeds from 0; means and standard deviations over them, of costs the largest; "
        '"over direct" compares the same seeds; "all peers" are the students of all online trainings, chosen or not. '
        "s: CPU seconds of one model without its teacher; online of all peers, "
        "a search with its trials and baselines.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    for name in SCALES:
        size.add_argument(f"--{name}", action="store_const", const=name, dest="size")
    add_datasets(parser)
    parser.add_argument("--out", type=Path, help="output folder (results/paper_b-SIZE)")
    parser.add_argument("--table", action="store_true", help="print what there is, and train nothing")
    arguments = parser.parse_args()
    out = arguments.out or Path("results", f"paper_b-{arguments.size}")
    out.mkdir(parents=True, exist_ok=True)
    study = Study(scale=SCALES[arguments.size], datasets=datasets_of(arguments), out=out, dry=arguments.table)
    rows = list(study.rows())
    for line in (*header(study, arguments.size), *table(rows)):
        print(line)


if __name__ == "__main__":
    main()
