"""How well the sum of a latency table predicts whole students: correlation and relative error.

Each choice of each block is timed in its frame, random students as wholes; half of them correct the table, the other
half tell how far off its sums are. The sum alone, and the number of MACs, stand beside it.

    python studies/latency_table.py --models cifar_resnet20 --students 16 --out docs/results/latency_table.md
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from scipy.stats import kendalltau

import nas_kd.models  # noqa: F401  # registers cifar_resnet20
from nas_kd.costs.cost_table import CostTable, cost_table
from nas_kd.costs.latency_table import LatencyTable, Meter
from nas_kd.costs.runtimes import LatencySpec
from nas_kd.costs.verification import analyse
from nas_kd.genotype import Genotype
from nas_kd.search.options import parse_options, restrict

SIZES = {"resnet18": 64, "mobilenetv2_100": 64, "cifar_resnet20": 32}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One base and runtime: what the table's making took, and how it predicts students that did not correct it."""

    base: str
    runtime: str
    parts: int
    seconds: float
    base_ms: float
    slope: float
    correlation: float
    tau: float
    tau_macs: float
    error_sum: float
    error: float


def students(table: CostTable, count: int, seed: int) -> list[Genotype]:
    """Random students, from mostly wide to mostly narrow."""
    generator = np.random.default_rng(seed)
    chosen = []
    for level in np.linspace(0.1, 0.9, count):
        rows = []
        for block in table.blocks:
            odds = np.array([np.exp(-abs(choice.width - level) / 0.15) for choice in block.choices])
            rows.append(int(generator.choice(len(odds), p=odds / odds.sum())))
        chosen.append(table.genotype(rows))
    return [chosen[index] for index in generator.permutation(count)]


def measure(name: str, runtime: str, arguments: argparse.Namespace) -> Row:
    torch.manual_seed(0)
    base, side = timm.create_model(name, num_classes=10), SIZES.get(name, 64)
    options = parse_options(arguments.space, ())
    analysis = restrict(analyse(base, (3, side, side), name=name, open=options.aspects), options)
    costs = cost_table(analysis, base)
    spec = LatencySpec(runtime="onnx" if runtime == "onnx" else "torch", batch=arguments.batch)
    latency = LatencyTable(base, analysis, (3, side, side), Meter(spec))
    started = time.monotonic()
    latency.measure_blocks()
    seconds, parts = time.monotonic() - started, latency.meter.measured
    chosen = students(costs, arguments.students, seed=1)
    half = len(chosen) // 2
    for genotype in chosen[:half]:
        latency.whole(genotype)
    corrected, (_, slope) = latency.onto(costs), latency.correction()
    rest = chosen[half:]
    sums = np.array([latency.sum_of(genotype) for genotype in rest])
    expected = np.array([corrected.cost(genotype).latency for genotype in rest])
    macs = np.array([costs.cost(genotype).macs for genotype in rest])
    truth = np.array([latency.whole(genotype) for genotype in rest])
    return Row(
        base=f"{name}, {side} px",
        runtime=runtime,
        parts=parts,
        seconds=seconds,
        base_ms=latency.whole_base / 1e6,
        slope=slope,
        correlation=float(np.corrcoef(expected, truth)[0, 1]),
        tau=float(kendalltau(expected, truth).statistic),
        tau_macs=float(kendalltau(macs, truth).statistic),
        error_sum=float(np.median(np.abs(sums / truth - 1))),
        error=float(np.median(np.abs(expected / truth - 1))),
    )


def lines(rows: Sequence[Row], arguments: argparse.Namespace) -> Iterator[str]:
    yield "# How well a latency table predicts whole students\n"
    yield (
        f"`studies/latency_table.py`, {arguments.students} random students each, half of which correct the table; "
        f"errors and ranks are of the other half. Batch {arguments.batch}, one thread, `--space {arguments.space}`. "
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at "
        "the end: other work ran beside it, so treat the errors as upper bounds.\n"
    )
    yield (
        "| base | runtime | structures timed | s | base ms | slope | correlation | τ of the table | τ of MACs | median "
        "error of the plain sum | of the corrected sum |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.base} | {row.runtime} | {row.parts} | {row.seconds:.0f} | {row.base_ms:.2f} | {row.slope:.2f} "
            f"| {row.correlation:.2f} | {row.tau:.2f} | {row.tau_macs:.2f} | {row.error_sum:.1%} | {row.error:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES))
    parser.add_argument("--runtimes", nargs="+", choices=("torch", "onnx"), default=["torch", "onnx"])
    parser.add_argument("--students", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--space", default="width,kernel,conv")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        for runtime in arguments.runtimes:
            rows.append(measure(name, runtime, arguments))
            print(rows[-1], flush=True)
            text = "\n".join(lines(rows, arguments)) + "\n"
            if arguments.out:
                arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
