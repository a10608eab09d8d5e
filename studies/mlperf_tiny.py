"""MLPerf Tiny's image classification: int8 accuracy on CIFAR-10's 10,000 test images beside bytes, arena and cycles.

    pip install 'nas-kd[mcu]'
    python studies/mlperf_tiny.py --cifar10 DIR --weights DIR [--epochs 4] [--only 'within ResNet-8, ours*']
    python studies/mlperf_tiny.py --smoke                       a few minutes, handwritten digits

`DIR` holds CIFAR-10 as image folders (train/CLASS, test/CLASS), or the public weights of the CIFAR ResNets. Points:

- within everything that the task's reference needs, a ResNet-8: params, MACs, and bytes, arena and cycles of its int8
  file, made by the same route
- within 512,024 bytes

At each our student (the integer programme on the base's library of closed forms; no trials; also where a dropped
block counts for little, so that there are fewer and wider ones) and torch-pruning's
(local l2, inner widths, until its int8 file is within everything, too), of the same base, which teaches both; at the
first the very ResNet-8 too, from scratch, plain and distilled. All see the same views of the images equally often, and
become int8 by calibration, with a recovery where that loses more than 0.3 points. bytes: the int8 TensorFlow Lite
file; arena: TensorFlow Lite Micro's, here; cycles: Vela's estimate for an Ethos-U55 of 128 MACs. The test split chooses
nothing, and learning rates were set beforehand. Rows are kept in `rows.jsonl` of `--out`: the same command again does
what is missing.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_tables import hardware, spread
from pruned import Method, prune
from torch import Tensor, nn
from versus_arms import Bench

from nas_kd.arguments.parsing import guarded
from nas_kd.budget import ACCELERATOR, Budget
from nas_kd.costs.verification import measure
from nas_kd.errors import NasKdError
from nas_kd.files.records import Records
from nas_kd.library.building import LibrarySpec, build_library
from nas_kd.networks.int8 import quantise
from nas_kd.networks.micro import MicroInterpreter, compile_file, need_tools
from nas_kd.networks.onnx import write_model
from nas_kd.networks.tflite import write_tflite
from nas_kd.pipeline.quantisation import INT8, Int8Spec, inputs_of, quantise_network
from nas_kd.preparation.augmenting import fresh_images
from nas_kd.search.starts import measured_starts
from nas_kd.training.evaluation import CALIBRATION, recalibrate
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe

Row = dict[str, Any]
OURS, FEWER, PRUNED, PLAIN, DISTILLED, WHOLE = (
    "ours",
    "ours, fewer blocks",
    "torch-pruning local l2 inner",
    "ResNet-8, labels alone",
    "ResNet-8, distilled",
    "the base as it is",
)
INNER = Method("local", "l2", "inner")
STEP, STEPS = 0.95, 30  # torch-pruning's bounds fall until its int8 file is within everything
VIEWS = 2  # of each image, augmented once
DROPPED = 0.2  # of T²·KL at most that a dropped block counts for where there are to be fewer
LR = {OURS: 0.03, FEWER: 0.1, PRUNED: 0.03, PLAIN: 0.1, DISTILLED: 0.1}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A base, the bounds of our study, those by which torch-pruning begins, and what is compared; `seeds` of arms that
    have more than one."""

    base: str
    budget: str
    counted: Mapping[str, int]
    arms: tuple[str, ...]
    seeds: Mapping[str, int] = field(default_factory=dict)


CIFAR = {
    "within ResNet-8": Point(
        base="cifar_resnet20",
        budget="params=78666,macs=12501632,flash=105528,ram=58336,cycles=210806",
        counted={"params": 78_666, "macs": 12_501_632},
        arms=(OURS, FEWER, PRUNED, DISTILLED, PLAIN),
        seeds={OURS: 2},
    ),
    "within 512,024 bytes": Point(
        base="cifar_resnet56",
        budget="flash=512024",
        counted={"params": 470_000},
        arms=(OURS, PRUNED),
        seeds={OURS: 2},
    ),
    "the smaller base": Point(base="cifar_resnet32", budget="flash=512024", counted={}, arms=(WHOLE,)),
}
DIGITS = {
    "smoke": Point(
        base="cifar_resnet20",
        budget="params=70%,macs=70%,flash=70%,ram=100%,cycles=80%",
        counted={"params": 190_000},
        arms=(OURS, PRUNED, DISTILLED),
    )
}


class ResNet8(nn.Module):
    """MLPerf Tiny's reference: 3×3 convolutions of 16, then a block each of 16, 32 and 64 channels; shortcuts that
    stride are 1×1 convolutions without a norm; biases everywhere. N×C×S×S → N×K."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
        widths = (16, 16, 32, 64)
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in pairwise(widths)))
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.inner = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x) + self.shortcut(x))


@dataclass(frozen=True, kw_only=True)
class Device:
    """What an int8 file takes: its bytes, its arena, its cycles."""

    flash: int
    ram: int
    cycles: int


def device_of(int8: Path) -> Device:
    """Of an int8 ONNX file, as TensorFlow Lite."""
    with tempfile.TemporaryDirectory() as folder:
        micro = Path(folder, "int8.tflite")
        write_tflite(int8, micro)
        arena, compiled = MicroInterpreter(micro).arena(), compile_file(micro, ACCELERATOR)
        return Device(flash=micro.stat().st_size, ram=arena.total, cycles=compiled.cycles)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The rows of one point: its images and teacher are made when they are first wanted."""

    name: str
    point: Point
    images: tuple[str, ...]  # arguments of the main command
    epochs: int
    out: Path
    lr: float | None = None  # of ours and torch-pruning's, where it was asked for
    views: int = VIEWS

    @cached_property
    def bench(self) -> Bench:
        words = ["--model", self.point.base, "--budget", self.point.budget, *self.images]
        return Bench(words, {}, 0.0, self.out / self.name.replace(" ", "-").replace(",", ""))

    @property
    def records(self) -> Records:
        return Records(self.out / "rows.jsonl")

    def runs(self) -> Iterator[tuple[str, int]]:
        """The first seed of each arm, then the others."""
        most = max(self.point.seeds.values(), default=1)
        for seed in range(most):
            yield from ((arm, seed) for arm in self.point.arms if seed < self.point.seeds.get(arm, 1))

    def run(self, arm: str, seed: int) -> None:
        """Makes, trains and measures a network, and writes its row; does nothing when that is there."""
        epochs = 0 if arm == WHOLE else self.epochs
        lr = LR.get(arm) if self.lr is None or arm in (PLAIN, DISTILLED) else self.lr
        asked = "" if lr == LR.get(arm) else f", lr {lr:g}"
        asked += "" if self.views == VIEWS or not epochs else f", {self.views} views"
        key = f"{self.name}, {arm}, {epochs} epochs{asked}, seed {seed}"
        if key in self.records:
            return
        print(f"{time.strftime('%H:%M')} {key}", file=sys.stderr, flush=True)
        started, bench = time.process_time(), self.bench
        torch.manual_seed(seed)
        row = {"point": self.name, "arm": arm + asked, "seed": seed, "epochs": epochs}
        try:
            network = self.made(arm)
        except NasKdError as error:
            print(error, file=sys.stderr, flush=True)
            self.records[key] = {**row, "failed": str(error)}
            return
        making = time.process_time() - started
        if epochs:
            weight = 0.0 if arm == PLAIN else 0.9
            recipe = Recipe(epochs=epochs, batch_size=64, lr=lr, seed=seed, distill_weight=weight)
            train(network, bench.views, recipe)
        splits, counted = bench.materials.splits, measure(network, bench.job.space.input_size)
        folder = bench.out / "models" / key.replace(" ", "-").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        spec, fresh = Int8Spec(seed=seed), fresh_images(bench.job.settings.data, splits.train, splits.num_classes)
        made = quantise_network(network, splits, folder, spec, fresh)
        self.records[key] = {
            **row,
            **{"images": epochs * len(splits.train), "params": counted.params, "macs": counted.macs},
            **asdict(device_of(folder / INT8)),
            **{"float": made.exact.test_accuracy, "int8": made.int8.test_accuracy, "recovered": made.recovered},
            **{"making": round(making, 1), "seconds": round(time.process_time() - started, 1)},
        }

    def made(self, arm: str) -> nn.Module:
        """The network of an arm before its training."""
        bench = self.bench
        calibration, size = bench.views.sample(CALIBRATION), bench.job.space.input_size
        if arm in (PLAIN, DISTILLED):
            return ResNet8(size[0], bench.materials.splits.num_classes)
        if arm == WHOLE:
            return bench.base
        network = self.pruned() if arm == PRUNED else self.ours(fewer=arm == FEWER)
        recalibrate(network, calibration)
        return network

    def ours(self, *, fewer: bool) -> nn.Module:
        """The integer programme's solution, its cycles estimated whole. Of `fewer` blocks: a dropped one counts for
        `DROPPED` at most: damages are measured untrained, and what is dropped is learnt again by long training."""
        space, spec = self.bench.job.space, LibrarySpec(rounds=(), anchor=False)
        images = self.bench.views.sample(spec.images + spec.holdout)
        library = build_library(self.bench.base, space.analysis, images, spec, self.bench.out / "cache")
        space = space.with_library(library)
        if not fewer:
            return space.student(space.starts(1)[-1])
        assert space.budget is not None
        kept = (np.array([choice.keep for choice in block.choices]) for block in space.blocks)
        damages = [np.where(k, own, np.minimum(own, DROPPED)) for k, own in zip(kept, library.damages(), strict=True)]
        return space.student(measured_starts(space.costs, space.budget, 1, damages, space.levels)[-1])

    def pruned(self) -> nn.Module:
        """The largest one that is within everything, in steps of 5 % of what can be counted."""
        bench, budget = self.bench, self.bench.job.budget
        calibration = bench.views.sample(CALIBRATION)
        for step in range(STEPS):
            bounds = Budget(tuple((kind, math.floor(STEP**step * most)) for kind, most in self.point.counted.items()))
            network = prune(bench.base, INNER, bounds, calibration)
            if network is None:
                break
            with tempfile.TemporaryDirectory() as folder:
                exact, int8 = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
                write_model(network.eval(), bench.job.space.input_size, exact)
                quantise(exact, inputs_of(calibration[:32]), int8)
                found = asdict(device_of(int8))
            if all(found[kind] <= budget[kind] for kind in found if kind in budget):
                return network
        raise NasKdError(f"torch-pruning does not get within {budget} of {self.point.base}")


COLUMNS = "int8 %,float %,bytes,arena,cycles,params,MACs,images,CPU s"


def page(studies: list[Study]) -> Iterator[str]:
    """The rows that are there, by point."""
    yield "# MLPerf Tiny's image classification\n"
    yield f"`python studies/mlperf_tiny.py`, {datetime.date.today()}, {hardware()}, {ACCELERATOR}.\n"
    yield (__doc__ or "").split("\n\n", 2)[2].split("\n\n", 1)[1] + "\n"
    for study in studies:
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in study.records.values():
            if row["point"] == study.name:
                groups.setdefault((row["arm"], row["epochs"]), []).append(row)
        if groups:
            yield f"## {study.name[0].upper()}{study.name[1:]}: {study.point.base}, {study.point.budget}\n"
            yield f"| | seeds | {COLUMNS.replace(',', ' | ')} |"
            yield f"|{'---|' * (2 + len(COLUMNS.split(',')))}"
            yield from (table_row(arm, group) for (arm, _), group in groups.items())
            yield ""


def table_row(arm: str, group: list[Row]) -> str:
    last = group[-1]
    if "failed" in last:
        return f"| {arm}: {last['failed']} |{' |' * (1 + len(COLUMNS.split(',')))}"
    scores = [spread([100 * row[kind] for row in group]) for kind in ("int8", "float")]
    costs = [f"{max(row[kind] for row in group):,}" for kind in ("flash", "ram", "cycles", "params", "macs", "images")]
    seconds = f"{sum(row['seconds'] for row in group) / len(group):.0f}"
    words = arm + (", recovered" if last["recovered"] else "")
    return f"| {words} | {len(group)} | {' | '.join([*scores, *costs, seconds])} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cifar10", type=Path, help="CIFAR-10 as image folders")
    add("--weights", type=Path, help="folder with the public weights of the CIFAR ResNets")
    add("--epochs", type=int, default=4, help="on 45,000 images (4)")
    add("--lr", type=float, help="peak learning rate of what begins with the base's weights (0.03)")
    add("--views", type=int, default=VIEWS, help=f"augmented views of each image ({VIEWS})")
    add("--only", action="append", help="rows that fit, as 'within ResNet-8, ours*' (repeatable; all)")
    add("--out", type=Path, default=Path("results", "mlperf_tiny"), help="rows, models, cache (results/mlperf_tiny)")
    add("--report", type=Path, help="the page (page.md in the output folder)")
    add("--smoke", action="store_true", help="handwritten digits, small")
    arguments = parser.parse_args()
    if not arguments.smoke and not (arguments.cifar10 and arguments.weights):
        parser.error("give --cifar10 and --weights, or --smoke")
    return arguments


def images_of(arguments: argparse.Namespace, base: str) -> tuple[str, ...]:
    """The arguments of the main command that say which images and weights there are, and how they are seen."""
    views = arguments.views
    usual = f"--views {views} --refine-epochs {views} --proxy-epochs 1 --proxy-images 1600"
    if arguments.smoke:
        return tuple(f"--img-size 16 --teacher-epochs 2 --train-images 320 {usual}".split())
    weights = arguments.weights / f"{base.replace('cifar_', 'cifar10_')}_akamaster.safetensors"
    where = ("--dataset", "folder", "--data-dir", str(arguments.cifar10), "--initial-checkpoint", str(weights))
    return (*where, *f"--img-size 32 --val-fraction 0.1 {usual}".split())


def compare(arguments: argparse.Namespace) -> int:
    need_tools("tflite_micro", "ethosu")
    torch.set_num_threads(1)
    studies = [
        Study(
            name=name,
            point=point,
            images=images_of(arguments, point.base),
            epochs=1 if arguments.smoke else arguments.epochs,
            out=arguments.out,
            lr=arguments.lr,
            views=arguments.views,
        )
        for name, point in (DIGITS if arguments.smoke else CIFAR).items()
    ]
    report = arguments.report or arguments.out / "page.md"
    for study in studies:
        for arm, seed in study.runs():
            if any(fnmatch.fnmatch(f"{study.name}, {arm}", pattern) for pattern in arguments.only or ["*"]):
                study.run(arm, seed)
                report.write_text("\n".join(page(studies)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda _: compare(parse()), sys.argv[1:]))
