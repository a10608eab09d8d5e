"""Whether proxies that are looked at in int8 order students better, where int8 is what will run.

    python studies/int8_ranking.py --dataset folder --data-dir cifar10 --initial-checkpoint FILE --rows rows.jsonl
    python studies/int8_ranking.py --rows rows.jsonl --page       # a section of docs/results/device.md

Students of a ResNet-20: random ones within the budget, and those that a search begins with. Each is trained as a trial
of a study is, and looked at on validation images in float (as a search does) and in int8 (calibrated on training
images, ONNX Runtime). Then it is trained as a model of the results is; its int8 accuracy on the test images is what a
user gets. Kendall's τ says how well either look orders that. Each student is one line of `--rows`; the same command
goes on.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.storages import InMemoryStorage
from paper_tables import hardware
from rich.console import Console
from scipy.stats import kendalltau
from torch import nn

from nas_kd import Genotype
from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.study import parse_study
from nas_kd.data.images import Images
from nas_kd.files.records import Records
from nas_kd.networks.int8 import quantise
from nas_kd.networks.onnx import write_model
from nas_kd.pipeline import prepare
from nas_kd.pipeline.quantisation import Int8Spec, accuracy_of, inputs_of
from nas_kd.preparation.job import Job, proxy_recipe_of, recipe_of, refine_epochs
from nas_kd.preparation.materials import gather
from nas_kd.progress import Stages
from nas_kd.search.starts import random_genotype
from nas_kd.search.trials import Proxy
from nas_kd.training.evaluation import CALIBRATION, evaluate, recalibrate
from nas_kd.training.loop import train

STUDY = (
    "--model cifar_resnet20 --img-size 32 --budget macs=50% --train-images 10000 --val-fraction 0.1 --views 2 "
    "--refine-epochs 2 --proxy-epochs 2 --proxy-images 1600 --no-base-bounds --no-baselines --seed 0 -q"
)
LOOK = 1000  # validation images for a look: what a search has time for


class Bench:
    """The study whose students are ranked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        data = ["--dataset", arguments.dataset, "--data-dir", arguments.data_dir]
        more = [*data, "--initial-checkpoint", arguments.initial_checkpoint, "--out", str(arguments.out)]
        self.job: Job = prepare(parse_study([*STUDY.split(), *more]), InMemoryStorage())
        self.job, self.materials = gather(self.job, Stages(Console(stderr=True), quiet=True))
        self.val = self.materials.splits.val[:LOOK]
        self.calibration = inputs_of(self.materials.splits.train[: Int8Spec().calibration_images])

    def genotypes(self, count: int) -> list[Genotype]:
        """As many random ones, and those that a search begins with."""
        space = self.job.space
        assert space.budget is not None
        drawn = [random_genotype(space.table, space.budget, seed) for seed in range(count)]
        return list(dict.fromkeys([*(one for one in drawn if one is not None), *space.starts()]))

    def row(self, genotype: Genotype) -> dict[str, Any]:
        """What a look at a proxy says, and what becomes of the student."""
        settings, materials = self.job.settings, self.materials
        proxy = Proxy(views=materials.proxy_views, val=self.val, recipe=proxy_recipe_of(settings))
        student = proxy.prepare(self.job.space.student(genotype))
        train(student, proxy.views, proxy.recipe)
        row: dict[str, Any] = {"macs": self.job.space.cost(genotype).macs, "proxy": proxy.score(student)}
        started = time.process_time()
        row["proxy int8"] = self.int8(student, self.val)
        row["look seconds"] = time.process_time() - started
        student = self.job.space.student(genotype)
        recalibrate(student, materials.refine_views.sample(CALIBRATION))
        train(student, materials.refine_views, recipe_of(settings, refine_epochs(self.job, materials.splits.train)))
        test = materials.splits.test
        return {**row, "test": evaluate(student, test), "test int8": self.int8(student, test)}

    def int8(self, student: nn.Module, images: Images) -> float:
        """The accuracy of a student in int8, calibrated and no more."""
        with tempfile.TemporaryDirectory() as place:
            exact, rounded = Path(place, "model.onnx"), Path(place, "model.int8.onnx")
            write_model(student.eval(), self.job.space.input_size, exact)
            quantise(exact, self.calibration, rounded)
            return accuracy_of(rounded, images)


def page(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The section, as Markdown."""
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    lost = {name: 100 * (column[name] - column[f"{name} int8"]) for name in ("proxy", "test")}
    yield f"{datetime.date.today()}, {hardware()}, seed 0, {len(rows)} students.\n"
    yield f"| what orders the students | τ with their int8 test accuracy |\n|{'---|' * 2}"
    for name, words in (
        ("proxy", "a proxy looked at in float"),
        ("proxy int8", "a proxy looked at in int8"),
        ("test", "the test accuracy of the trained student in float"),
        ("macs", "MACs"),
    ):
        yield f"| {words} | {kendalltau(column[name], column['test int8']).statistic:.2f} |"
    best, worst = 100 * column["test int8"].max(), 100 * column["test int8"].min()
    kept, looked = lost["test"], lost["proxy"]
    yield (
        f"\nInt8 costs {kept.mean():.2f} points of test accuracy in the mean (at most {kept.max():.2f}), "
        f"{looked.mean():.2f} of a proxy's validation accuracy (at most {looked.max():.2f}); in int8 the "
        f"students have {worst:.1f} to {best:.1f} % of the test images. A look in int8 takes "
        f"{statistics.mean(column['look seconds']):.1f} CPU-seconds."
    )


def main(arguments: argparse.Namespace) -> int:
    records = Records(arguments.rows)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not arguments.page:
        bench = Bench(arguments)
        for genotype in bench.genotypes(arguments.students):
            if genotype.digest not in records:
                print(f"{time.strftime('%H:%M')} {genotype.digest}", file=sys.stderr, flush=True)
                records[genotype.digest] = bench.row(genotype)
    print("\n".join(page(records.values())))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="folder")
    parser.add_argument("--data-dir", default="cifar10")
    parser.add_argument("--initial-checkpoint", help="weights of the base, the teacher")
    parser.add_argument("--students", type=int, default=12, help="random ones (12), beside a search's first")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results", "int8-ranking"), help="cache")
    parser.add_argument("--page", action="store_true", help="print what the rows say, measure nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(guarded(lambda _: main(parse()), sys.argv[1:]))
