"""Our students beside what people would use instead: same base, teacher, images and bound (MACs, params, milliseconds).

    python studies/versus.py smoke                                                          two minutes, digits
    python studies/versus.py resnet20 --dataset folder --data-dir cifar10 --initial-checkpoint FILE
    python studies/versus.py resnet20_params … the same, at equal params
    python studies/versus.py mobilenetv2 --dataset folder --data-dir cifar10 --teacher FOLDER
    python studies/versus.py resnet20_half_time … the same, at half of its milliseconds in ONNX Runtime
    python studies/versus.py resnet20_third_time … the same, at a third
    python studies/versus.py lite0_half_time --dataset folder --data-dir photos --initial-checkpoint FILE
    python studies/versus.py lite0_third_time … the same, at a third
    python studies/versus.py mobilenetv2_half_time --dataset folder --data-dir cifar10 --teacher FOLDER
    python studies/versus.py mobilenetv2_third_time … the same, at a third
    python studies/versus.py fashion --dataset torch/fashion_mnist --data-dir DIR --teacher FOLDER
    python studies/versus.py fashion_tight … the same, at a third of the MACs

Each arm makes a network within the bound (versus_arms.py), which then learns from the same teacher's logits on the same
augmented images:

- ours: `knapsack`, the library of block choices and the integer programme on it, no trials; `search`, the product:
  trials after that, of which the best is refined. With the default library, or a `small` one
- torch-pruning (pruned.py): group norm, batch-norm scale, Taylor
- NVIDIA ModelOpt's FastNAS where it is installed, and small models of timm's from scratch (peers.py)
- a search by Optuna and timm alone (plain_optuna.py), about as long as our library and trials

Compared with equal training images, and with equal CPU time of all that comes after the teacher and its logits: an arm
that needs little before its training trains for longer. Learning rates are chosen by validation accuracy on seed 0,
where there are several. The test split decides nothing. What is done is kept in `PAIR/rows.jsonl` of the output folder:
the same command again does what is missing. After each row page and picture are written from all pairs that are there.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import peers
import plain_optuna
import torch
from torch import nn
from versus_arms import FASTNAS, FRESH, OURS, PLAIN, PRUNED, Bench, Ours, OutOfReachError
from versus_page import write_page

from nas_kd.arguments.choices import ChoicesSettings
from nas_kd.arguments.parsing import guarded
from nas_kd.rank_check.portions import Portions
from nas_kd.training.evaluation import evaluate
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe

GROUP_NORM, WHOLE, SCALE, TAYLOR = (
    f"torch-pruning local {kind}" for kind in ("l2 inner", "l2 whole", "bn inner", "taylor whole")
)
SMALL = "width=0.25/0.5/1,conv"
SMALL_ARMS = {
    "knapsack, small": Ours(space=SMALL, rounds=()),
    "search, small": Ours(space=SMALL, rounds=(), trials=16),
}
THREE = {"knapsack, small": 3, "search, small": 3, GROUP_NORM: 3}  # seeds
LEAST = 0.15  # of an equal compute must be left for training
TEACHER = "the base, the teacher"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A base with its images (`study`: arguments of the main command), and what is compared: `arms` with equal
    `images`, `timed` ones in each of `totals` CPU seconds. `rates` are tried, by what a network begins with; `seeds` is
    1 where nothing is said."""

    title: str
    study: str
    images: int
    totals: tuple[int, ...]
    ours: Mapping[str, Ours]
    peers: tuple[str, ...]
    timed: tuple[str, ...]
    rates: Mapping[str, tuple[float, ...]]
    seeds: Mapping[str, int] = field(default_factory=dict)
    plain_seconds: float = 150.0
    batch_size: int = 64

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms; FastNAS only where it is installed."""
        return tuple(arm for arm in (*self.ours, *self.peers) if arm != FASTNAS or peers.modelopt() is not None)


def _in_time(base: str, study: str, share: int, words: str, **more: Any) -> Pair:
    """A base within this share of its latency (percent), which is measured for all arms alike. torch-pruning keeps
    multiples of 8 channels in two arms: with odd widths runtimes are slow for the MACs."""
    small, rounded = Ours(space=SMALL, stages=True, rounds=()), f"{WHOLE}, multiples of 8"
    return Pair(
        title=f"{base} at {words} of its milliseconds",
        study=f"{study} --budget latency={share}% --proxy-epochs 1",
        ours={
            "knapsack, small": small,
            "knapsack, closed forms": Ours(space=ChoicesSettings().space, stages=True, rounds=()),
        },
        peers=(WHOLE, TAYLOR, rounded, f"{TAYLOR}, multiples of 8"),
        timed=("knapsack, small", "knapsack, closed forms", rounded),
        seeds={"knapsack, small": 2, "knapsack, closed forms": 2, WHOLE: 2, TAYLOR: 2, rounded: 2},
        **more,
    )


_resnet20_in_time = functools.partial(
    _in_time,
    "ResNet-20 on CIFAR-10",
    "--model cifar_resnet20 --img-size 32 --val-fraction 0.1 --views 1 --refine-epochs 1 --proxy-images 1600",
    images=12_800,
    totals=(60, 200),
    rates={OURS: (0.005, 0.01), PRUNED: (0.0075, 0.02)},
)
_lite0_in_time = functools.partial(
    _in_time,
    "EfficientNet-Lite0 on photos of ten classes at 128 px",
    "--model tf_efficientnet_lite0 --img-size 128 --views 3 --refine-epochs 3 --proxy-images 300",
    images=3_600,
    totals=(250,),
    rates={OURS: (0.005, 0.01), PRUNED: (0.0075, 0.02)},
)
_mobilenetv2_in_time = functools.partial(
    _in_time,
    "MobileNetV2 on CIFAR-10",
    "--model mobilenetv2_100 --reduction 16 --img-size 32 --val-fraction 0.1 --views 1 --refine-epochs 1 "
    "--proxy-images 1600",
    images=12_800,
    totals=(150,),
    rates={OURS: (0.005, 0.01), PRUNED: (0.0075, 0.02)},
)


PAIRS = {
    "mobilenetv2_half_time": _mobilenetv2_in_time(50, "half"),
    "mobilenetv2_third_time": _mobilenetv2_in_time(33, "a third"),
    "resnet20_half_time": _resnet20_in_time(50, "half"),
    "resnet20_third_time": _resnet20_in_time(33, "a third"),
    "lite0_half_time": _lite0_in_time(50, "half"),
    "lite0_third_time": _lite0_in_time(33, "a third"),
    "smoke": Pair(
        title="cifar_resnet20 on handwritten digits",
        study="--model cifar_resnet20 --img-size 16 --budget macs=30% --teacher-epochs 12 --batch-size 32 --views 1 "
        "--refine-epochs 1 --proxy-epochs 1 --proxy-images 320",
        images=1280,
        totals=(20,),
        ours={"knapsack, small": Ours(space=SMALL, rounds=()), "search, small": Ours(space=SMALL, rounds=(), trials=9)},
        peers=(GROUP_NORM, FASTNAS, "timm tinynet_e/16", PLAIN),
        timed=("knapsack, small", GROUP_NORM),
        rates={OURS: (0.005,), PRUNED: (0.005, 0.01), FRESH: (0.1,)},
        plain_seconds=3,
    ),
    "resnet20": Pair(
        title="ResNet-20 on CIFAR-10",
        study="--model cifar_resnet20 --img-size 32 --budget macs=30% --val-fraction 0.1 --views 2 --refine-epochs 2 "
        "--proxy-epochs 1 --proxy-images 1600 --amp",
        images=25_600,
        totals=(40, 200),
        ours={
            **SMALL_ARMS,
            "knapsack": Ours(),
        },
        peers=(GROUP_NORM, SCALE, TAYLOR, FASTNAS, PLAIN, "timm tinynet_d/16", "timm mobilenetv2_050/16"),
        timed=("knapsack, small", GROUP_NORM),
        rates={OURS: (0.005,), PRUNED: (0.0075,), FRESH: (0.1,)},  # its validation images were seen by the teacher
        seeds=THREE,
        plain_seconds=60,
    ),
    "resnet20_params": Pair(
        title="ResNet-20 on CIFAR-10, at equal params",
        study="--model cifar_resnet20 --img-size 32 --budget params=30% --val-fraction 0.1 --views 1 --refine-epochs 1 "
        "--proxy-epochs 1 --proxy-images 1600 --amp",
        images=25_600,
        totals=(60,),
        ours=SMALL_ARMS,
        peers=(GROUP_NORM, WHOLE, SCALE, TAYLOR),  # of timm's models none is that small, the other searches bound MACs
        timed=("knapsack, small", GROUP_NORM),
        rates={OURS: (0.005, 0.002), PRUNED: (0.0075, 0.02)},
        seeds=THREE,
    ),
    "resnet56": Pair(  # a GPU: published at this cost, 93.64 from 93.53
        title="ResNet-56 on CIFAR-10 at 1/2.57 of the MACs",
        study="--model cifar_resnet56 --img-size 32 --budget macs=38.9% --val-fraction 0.1 --views 20 "
        "--refine-epochs 1 --proxy-epochs 1 --proxy-images 1600 --amp --workers 8",
        images=45_000 * 30,
        totals=(),
        ours={"knapsack, small": Ours(space=SMALL, rounds=())},
        peers=(GROUP_NORM, WHOLE, SCALE, TAYLOR),
        timed=(),
        rates={OURS: (0.05,), PRUNED: (0.05,)},  # its validation images were seen by the teacher
        batch_size=128,
    ),
    "tiny": Pair(  # a GPU: int8 accuracy of what it exports is measured elsewhere
        title="ResNet-20 on CIFAR-10 within the params and MACs of MLPerf Tiny's ResNet-8",
        study="--model cifar_resnet20 --img-size 32 --budget params=78666,macs=12.5M --val-fraction 0.1 --views 20 "
        "--refine-epochs 1 --proxy-epochs 1 --proxy-images 1600 --amp --workers 8",
        images=45_000 * 40,
        totals=(),
        ours={"knapsack, widths": Ours(space="width", rounds=())},
        peers=(GROUP_NORM, WHOLE, SCALE),
        timed=(),
        rates={OURS: (0.05,), PRUNED: (0.05,)},
        seeds={"knapsack, widths": 2},
        batch_size=128,
    ),
    "fashion": Pair(
        title="ResNet-20 on Fashion-MNIST at 16×16",
        study="--model cifar_resnet20 --img-size 16 --budget macs=30% --val-fraction 0.1 --views 1 --refine-epochs 1 "
        "--proxy-epochs 1 --proxy-images 1600 --amp",
        images=25_600,
        totals=(40,),
        ours=SMALL_ARMS,
        peers=(GROUP_NORM, SCALE, TAYLOR, FASTNAS, PLAIN, "timm tinynet_e/16"),
        timed=("knapsack, small", GROUP_NORM),
        rates={OURS: (0.005, 0.02), PRUNED: (0.005, 0.02), FRESH: (0.1,)},
        seeds=THREE,
        plain_seconds=40,
    ),
    "fashion_tight": Pair(
        title="ResNet-20 on Fashion-MNIST at 16×16, a tenth of the MACs",
        study="--model cifar_resnet20 --img-size 16 --budget macs=10% --val-fraction 0.1 --views 1 --refine-epochs 1 "
        "--proxy-epochs 1 --proxy-images 1600 --amp",
        images=25_600,
        totals=(40,),
        ours=SMALL_ARMS,
        peers=(GROUP_NORM, WHOLE, SCALE, TAYLOR, FASTNAS, PLAIN),
        timed=("knapsack, small", "search, small", GROUP_NORM, TAYLOR),
        rates={OURS: (0.005, 0.02), PRUNED: (0.005, 0.02), FRESH: (0.1,)},
        seeds={**THREE, TAYLOR: 3},
        plain_seconds=40,
    ),
    "mobilenetv2": Pair(
        title="MobileNetV2 on CIFAR-10",
        study="--model mobilenetv2_100 --reduction 16 --img-size 32 --budget macs=30% --val-fraction 0.1 --views 1 "
        "--refine-epochs 1 --proxy-epochs 1 --proxy-images 1600",
        images=12_800,
        totals=(100,),
        ours={
            "knapsack, small": Ours(space="width", rounds=()),
            "search, small": Ours(space="width", rounds=(), trials=16),
        },
        peers=(GROUP_NORM, WHOLE, SCALE, TAYLOR, PLAIN, "timm tinynet_e/16", "timm efficientnet_b1_pruned/32"),
        timed=("knapsack, small", GROUP_NORM),
        rates={OURS: (0.005, 0.02), PRUNED: (0.005, 0.02), FRESH: (0.1,)},
        seeds=THREE,
        plain_seconds=40,
    ),
}


@dataclass(frozen=True)
class Run:
    """One training of an arm's network: with the pair's equal images, or as many as fit into `total` seconds."""

    arm: str
    seed: int
    lr: float
    total: int = 0

    @property
    def key(self) -> str:
        return f"row {self.arm} {self.seed} {self.lr:g} {self.total}"


class Versus:
    """A pair, and the rows that are there."""

    def __init__(self, pair: Pair, bench: Bench) -> None:
        self.pair, self.bench, self.records = pair, bench, bench.records

    def plan(self, patterns: Sequence[str]) -> Iterator[Run]:
        """The runs of the arms that fit one of the patterns. What was decided is looked up when it is needed."""
        chosen = [arm for arm in self.pair.arms if any(fnmatch.fnmatch(arm, pattern) for pattern in patterns)]
        for arm in chosen:
            yield from (Run(arm, 0, lr) for lr in self.candidates(arm))
        for total in self.pair.totals:
            yield from (Run(arm, 0, self.lr(arm), total) for arm in chosen if arm in self.pair.timed)
        for arm in chosen:
            yield from (Run(arm, seed, self.lr(arm)) for seed in range(1, self.pair.seeds.get(arm, 1)))

    def candidates(self, arm: str) -> tuple[float, ...]:
        """The learning rates that are tried for an arm: all those of its family for the first arm of it."""
        family = self.bench.family(arm)
        first = next(other for other in self.pair.arms if self.bench.family(other) == family)
        return self.pair.rates[family] if arm == first and arm != PLAIN else (self.lr(arm),)

    def lr(self, arm: str) -> float:
        """The learning rate with the best validation accuracy in the family; of the plain search, the one it found."""
        family = self.bench.family(arm)
        if arm == PLAIN:
            return self.bench.made(arm, 0).lr or self.pair.rates[family][0]
        first = next(other for other in self.pair.arms if self.bench.family(other) == family)
        rates = self.pair.rates[family]
        vals = {lr: self.records[key]["val"] for lr in rates if (key := Run(first, 0, lr).key) in self.records}
        return max(rates, key=lambda lr: vals.get(lr, 0.0))

    def run(self, run: Run) -> None:
        """Trains and tests a network and writes its row; does nothing when it is there, or when there is no time."""
        if run.key in self.records or beyond(run.arm) in self.records:
            return
        print(f"{time.strftime('%H:%M')} {run}", file=sys.stderr, flush=True)
        try:
            made = self.bench.made(run.arm, run.seed)
        except OutOfReachError as error:
            print(error, file=sys.stderr)
            self.records[beyond(run.arm)] = True
            return
        images = self.images(run, made.library + made.other)
        if images == 0:
            return
        started = time.process_time()
        self.train(made.network, run, images)
        training = time.process_time() - started
        self.bench.keep(made.network, run.key)
        cost, splits = self.bench.cost(made.network), self.bench.materials.splits
        self.records[run.key] = {
            **{"arm": run.arm, "seed": run.seed, "lr": run.lr, "total": run.total, "images": images},
            **{"macs": cost.macs, "params": cost.params, "latency": cost.latency},
            **{"library": made.library, "other": made.other, "training": training, "words": made.words},
            "val": evaluate(made.network, splits.val),
            "test": evaluate(made.network, splits.test),
        }

    def images(self, run: Run, spent: float) -> int:
        """How many images a run sees; at equal compute by the speed of the run with equal images. 0 when the time is
        spent."""
        if not run.total:
            return self.pair.images
        row = self.records[Run(run.arm, 0, run.lr).key]
        left = run.total - spent
        return int(left * row["images"] / row["training"]) if left > LEAST * run.total else 0

    def train(self, network: nn.Module, run: Run, images: int) -> None:
        """Networks with fresh weights learn by timm's task, others in our loop: the same loss, recipe and batches."""
        if self.bench.family(run.arm) == FRESH:
            training = plain_optuna.Training(images, run.lr, run.seed, self.bench.amp)
            plain_optuna.distil(network, self.bench.plain_data(), training)
            return
        epochs = math.ceil(images / len(self.bench.views))
        recipe = Recipe(epochs=epochs, batch_size=self.pair.batch_size, lr=run.lr, seed=run.seed, amp=self.bench.amp)
        train(network, Portions(self.bench.views, images // epochs, run.seed), recipe)

    def teacher(self) -> None:
        """The row of the base itself."""
        if TEACHER not in self.records:
            base, splits = self.bench.base, self.bench.materials.splits
            cost, test = self.bench.cost(base), evaluate(base, splits.test)
            counted = {"macs": cost.macs, "params": cost.params, "latency": cost.latency}
            self.records[TEACHER] = {**counted, "test": test}


def beyond(arm: str) -> str:
    """The key under which it is noted that an arm does not get within the bound."""
    return f"beyond {arm}"


def facts(pair: Pair, bench: Bench, command: str) -> dict[str, Any]:
    """What the page says of a pair beside its rows."""
    chosen = {arm: Versus(pair, bench).lr(arm) for arm in pair.arms if arm != PLAIN}
    kind, amount = next(iter(bench.job.budget.items()))
    out = [arm for arm in pair.arms if beyond(arm) in bench.records]
    bound = {"bounded": kind, "bound": amount, "train": len(bench.materials.splits.train), "beyond": out}
    return {"title": pair.title, "study": pair.study, **bound, "command": command, "rates": chosen}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pair", choices=PAIRS)
    add("--dataset", help="as for nas_kd.study (digits)")
    add("--data-dir", help="where the data lies")
    add("--initial-checkpoint", help="weights of the base, the teacher (trained here)")
    add("--teacher", help="or a folder that `python -m nas_kd.distill` exported: the base with its weights")
    add("--out", type=Path, help="output folder (results/versus, results/versus-smoke)")
    add("--report", type=Path, help="the page; its picture beside it (versus.md in the output folder)")
    add("--arms", nargs="+", default=["*"], help="only arms that fit, e.g. 'torch-pruning*'")
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path("results", "versus-smoke" if arguments.pair == "smoke" else "versus")
    return arguments


def compare(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pair, out = PAIRS[arguments.pair], arguments.out / arguments.pair
    out.mkdir(parents=True, exist_ok=True)
    options = ("dataset", "data_dir", "initial_checkpoint")
    data = [(f"--{name.replace('_', '-')}", value) for name in options if (value := getattr(arguments, name))]
    study = [*pair.study.split(), *(word for words in data for word in words)]
    if arguments.teacher:
        study += ["--model", f"local-dir:{arguments.teacher}", "--pretrained"]
        data.append(("--teacher", arguments.teacher))
    bench = Bench(study, pair.ours, pair.plain_seconds, out)
    shown = " ".join(f"{option} {Path(value).name}" for option, value in data)
    command = f"python studies/versus.py {arguments.pair} {shown}".strip()
    versus, page = Versus(pair, bench), arguments.report or arguments.out / "versus.md"
    versus.teacher()
    bench.records["pair"] = facts(pair, bench, command)
    write_page(arguments.out, page)
    for run in versus.plan(arguments.arms):
        versus.run(run)
        bench.records["pair"] = facts(pair, bench, command)
        write_page(arguments.out, page)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda _: compare(parse()), sys.argv[1:]))
