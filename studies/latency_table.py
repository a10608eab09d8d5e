"""How well latencies are predicted: Kendall's τ, mean error, bias, for random students and at the solver's solutions.

    python studies/latency_table.py --models mobilenetv2_100 --out docs/results/latency_table.md

The table of a base is made as a study makes it. Then `--students` random ones are measured whole, which it has not
seen; and for each bound the students that a search begins with, as they were expected in the first round and in the
last, after what was measured in between has corrected the table. Ratios to the base, so the machine's pace is out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from paper_tables import hardware
from scipy.stats import kendalltau
from torch import nn

import nas_kd.models  # noqa: F401  # registers cifar_resnet20
from nas_kd.budget import LATENCY, Budget
from nas_kd.costs.latency_table import LatencyTable, Meter, drawn
from nas_kd.costs.runtimes import LatencySpec
from nas_kd.errors import BudgetError
from nas_kd.genotype import Genotype
from nas_kd.search.options import parse_options
from nas_kd.search.space import Space
from nas_kd.search.starts import mixed_starts

MODELS = {"cifar_resnet20": 32, "mobilenetv2_100": 128, "tf_efficientnet_lite0": 128, "resnet18": 128}
SHARES = (0.5, 0.33)
COLUMNS = ("base", "base ms", "CPU-s", "students", "τ", "mean error", "bias", "asked", "measured, least to most")
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Some students: what was expected of them and what they took, as shares of the base's latency."""

    what: str
    expected: Floats
    measured: Floats
    asked: str = ""

    def cells(self) -> list[str]:
        errors = self.expected / self.measured - 1
        tau = kendalltau(self.expected, self.measured).statistic
        asked = [self.asked, f"{self.measured.min():.2f}–{self.measured.max():.2f}"]
        return [self.what, f"{tau:.2f}", f"{np.abs(errors).mean():.1%}", f"{errors.mean():+.1%}", *asked]


def latency_of(space: Space[nn.Module]) -> LatencyTable:
    assert space.costs.latency is not None
    return space.costs.latency


def compared(space: Space[nn.Module], genotypes: Sequence[Genotype], what: str, asked: str = "") -> Row:
    """Some students, expected and then measured."""
    latency = latency_of(space)
    base = latency.whole_base
    expected = np.array([space.table.cost(genotype).latency for genotype in genotypes]) / base
    measured = np.array(latency.wholes(genotypes, layers=True)) / base
    return Row(what=what, expected=expected, measured=measured, asked=asked)


def rows_of(space: Space[nn.Module], students: int, seed: int) -> Iterator[Row]:
    """The random students, and those that a search within each bound begins with."""
    latency = latency_of(space)
    yield compared(space, drawn(space.blocks, students, seed), f"{students} random")
    space.costs.recall({})  # the table is corrected by what was measured
    for share in SHARES:
        budget = Budget(((LATENCY, round(share * latency.whole_base)),))
        asked = f"{share:.2f}"
        try:
            bounded = space.with_budget(budget)
        except BudgetError as error:
            print(error)
            continue
        for name in ("first", "corrected"):
            chosen = mixed_starts(space.table, budget, 6)
            yield compared(space, chosen, f"{name} {len(chosen)} starts", asked)
            space.costs.recall({})
        chosen = bounded.starts(6)
        base = latency.whole_base
        took = np.array([space.cost(genotype)[LATENCY] for genotype in chosen]) / base
        expected = np.array([space.table.cost(genotype).latency for genotype in chosen]) / base
        yield Row(what=f"{len(chosen)} as a search begins", expected=expected, measured=took, asked=asked)


def lines(name: str, arguments: argparse.Namespace) -> Iterator[str]:
    torch.manual_seed(arguments.seed)
    side = MODELS.get(name, 128)
    base = timm.create_model(name, num_classes=10)
    options = parse_options(arguments.space, search_stages=arguments.search_stages)
    started = time.process_time()
    space = Space(base, img_size=side, options=options, meter=Meter(LatencySpec(runtime=arguments.runtime)))
    seconds = time.process_time() - started
    about = [f"{name}, {side} px", f"{latency_of(space).whole_base / 1e6:.2f}", f"{seconds:.0f}"]
    for row in rows_of(space, arguments.students, arguments.seed + 7):
        yield f"| {' | '.join([*about, *row.cells()])} |"
        about = ["", "", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--runtime", choices=("onnx", "torch"), default="onnx")
    parser.add_argument("--students", type=int, default=12)
    parser.add_argument("--space", default="width,kernel,conv")
    parser.add_argument("--search-stages", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [f"{hardware()}\n", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    print("\n".join(found))
    for name in arguments.models:
        for line in lines(name, arguments):
            found.append(line)
            print(line, flush=True)
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write("\n".join(found) + "\n")


if __name__ == "__main__":
    main()
