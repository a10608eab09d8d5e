"""Paper B's comparison: each cheap convolution trained directly, beside a finished teacher, and online with its peers.

    python studies/paper_b.py --smoke                                                minutes, handwritten digits
    python studies/paper_b.py --short --dataset folder --data-dir DIR > docs/results/paper_b.md     hours on a CPU
    python studies/paper_b.py --full --dataset torch/cifar10 --data-dir DIR           a GPU: the paper's own recipe

"Compressing CNNs with cheap convolutions and online distillation" (arXiv 1909.13063). Every training is one command,
`python -m nas_kd.distill …`, kept in `rows.jsonl` of the output folder: a killed study goes on where it was. The
teacher of offline distillation is the standard form of the same seed, trained here. The test split is looked at once
per model; online, the student is chosen on validation images. All forms of a seed see the same number of images.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from nas_kd.distill import main as distill

CONVS = ("depthwise", "shift", "group4")
AUTHORS_FORM = ("cifar_resnet20_cheap", "cifar_resnet56_cheap")  # their kind is an argument of the model
METHODS = {
    "direct": ["--no-teacher"],
    "offline KD": ["--teacher", "{teacher}"],
    "online": ["--online", "--peers", "{peers}"],
}
PAPER = "--epochs 300 --batch-size 128 --lr 0.1 --schedule step --weight-decay 2e-4 --views 0 --amp"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the study is: which bases with which cheap forms, and how each model is trained."""

    bases: dict[str, tuple[str, ...]]
    arguments: str
    seeds: int = 3
    peers: int = 4


SCALES = {
    "smoke": Scale(
        bases={"cifar_resnet20_cheap": CONVS[:2]},
        arguments="--img-size 16 --train-images 800 --epochs 6 --lr 0.1 --batch-size 32",
        seeds=2,
        peers=2,
    ),
    "short": Scale(
        bases={"cifar_resnet20_cheap": CONVS},
        arguments="--train-images 5000 --epochs 12 --lr 0.1 --batch-size 64 --weight-decay 2e-4 --views 12",
    ),
    "full": Scale(
        bases={"cifar_resnet56_cheap": CONVS, "cifar_vgg16_bn": CONVS, "mobilenetv2_100 --reduction 8": ("shift",)},
        arguments=f"--img-size 32 {PAPER}",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study under way: its scale, its data, and the folder that keeps everything."""

    scale: Scale
    data: tuple[str, ...]
    out: Path

    def rows(self) -> list[dict[str, Any]]:
        """What is finished."""
        path = self.out / "rows.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut the last one

    def train(self, base: str, conv: str, method: str, seed: int) -> dict[str, Any]:
        """The row of one model, from the file or trained now."""
        arguments = [*model_arguments(base, conv), *self.method_arguments(base, method, seed), "--seed", str(seed)]
        arguments += [*self.scale.arguments.split(), *self.data]
        for row in self.rows():
            if row["arguments"] == arguments:
                return row
        out = self.out / f"{base.split()[0]}-{conv}-{method.replace(' ', '-')}-{seed}"
        sys.stderr.write(f"python -m nas_kd.distill {shlex.join(arguments)}\n")
        started = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):  # the tables of single models
            code = distill([*arguments, "--out", str(out), "--cache", str(self.out / "cache")])
        if code:
            sys.exit(code)
        found = json.loads((out / "distill.json").read_text(encoding="utf-8"))
        row = {"base": base, "conv": conv, "method": method, "seed": seed, "arguments": arguments, **found}
        row |= {"seconds": round(time.monotonic() - started, 1), "path": str(out / found["path"])}
        with (self.out / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def method_arguments(self, base: str, method: str, seed: int) -> list[str]:
        teacher = self.train(base, "standard", "direct", seed)["path"] if method == "offline KD" else ""
        return [word.format(teacher=teacher, peers=self.scale.peers) for word in METHODS[method]]

    def all(self) -> Iterator[dict[str, Any]]:
        """Every row of the study, seed by seed."""
        for seed in range(self.scale.seeds):
            for base, convs in self.scale.bases.items():
                yield self.train(base, "standard", "direct", seed)
                for conv in convs:
                    for method in METHODS:
                        yield self.train(base, conv, method, seed)


def model_arguments(base: str, conv: str) -> list[str]:
    """A base in the form of this kind of convolution: the authors' own networks, or any timm model by `--conv`."""
    if base in AUTHORS_FORM:
        return [base, "--model-kwargs", f"conv={conv}"]
    return [*base.split(), *([] if conv == "standard" else ["--conv", conv])]


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Means and standard deviations over the seeds, and how far above direct training."""
    yield "| base | convolution | training | params | MACs | test accuracy % | over direct | s |"
    yield "|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["base"], row["conv"], row["method"]), []).append(row)
    for (base, conv, method), group in groups.items():
        scores = [100 * row["test accuracy"] for row in group]
        direct = [100 * row["test accuracy"] for row in groups[base, conv, "direct"]]
        gains = [score - other for score, other in zip(scores, direct, strict=True)]
        gain = "" if method == "direct" else f"{mean(gains)}"
        seconds = statistics.mean(row["seconds"] for row in group)
        cost = f"{group[0]['params']:,} | {group[0]['macs']:,}"
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
    yield (
        f"Each model: `python -m nas_kd.distill … {study.scale.arguments}`, online with {study.scale.peers} peers. "
        'Means and standard deviations over the seeds; "over direct" compares the same seeds. Online distillation '
        "costs as many trainings as it has peers (s: seconds of one model, the offline teacher not included).\n"
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
    rows = list(study.all())
    for line in (*header(study, arguments.size), *table(rows)):
        print(line)


if __name__ == "__main__":
    main()
