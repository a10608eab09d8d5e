"""The cycles that a search expects of students beside those that Vela estimates of their int8 files.

    pip install 'nas-kd[mcu]'
    python studies/cycles.py > cycles.md      # a section of docs/results/device.md

Students are drawn at random (seed 0), and what the knapsack finds within 50 % and 33 % of the base's cycles. Weights
are normal, of the size that training begins with; int8 by ONNX Runtime on four random images. `table` is what the
search goes by, before it has seen the student; `whole` what it is estimated at before it trains; `file` Vela's figure
for the file.
"""

from __future__ import annotations

import datetime
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
from scipy.stats import kendalltau, spearmanr
from torch import nn

import nas_kd
import nas_kd.models
from nas_kd.budget import ACCELERATOR, CYCLES, Budget
from nas_kd.costs.cycle_table import STUDENTS
from nas_kd.networks.int8 import quantise
from nas_kd.networks.micro import Estimator
from nas_kd.networks.onnx import write_model
from nas_kd.networks.tflite import write_tflite
from nas_kd.search.options import parse_options
from nas_kd.search.solver import solve
from nas_kd.search.starts import prior_damages

BASES = {"cifar_resnet20": 32, "mobilenetv2_050": 96, "mobilenetv3_small_050": 96}
EACH, SHARES = 8, (0.5, 0.33)


def filled(network: nn.Module) -> nn.Module:
    """With no layer of zeros, as a last norm or a kernel that grew begins."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return network.eval()


def chosen(space: nas_kd.Space[nn.Module]) -> Iterator[tuple[str, nas_kd.Genotype]]:
    rng = np.random.default_rng(0)
    for number in range(EACH):
        yield f"random {number}", space.table.genotype([int(rng.integers(len(b.choices))) for b in space.blocks])
    for share in SHARES:
        budget = Budget(((CYCLES, share * space.base_cost().cycles),))
        found = solve(space.table, budget, prior_damages(space.table), gap=0.01)
        if found is not None:
            yield f"within {share:.0%}", found


def of_file(student: nn.Module, size: tuple[int, int, int], estimator: Estimator) -> int:
    with tempfile.TemporaryDirectory() as folder:
        exact, int8, micro = (Path(folder, part) for part in ("float.onnx", "int8.onnx", "int8.tflite"))
        write_model(student, size, exact)
        quantise(exact, torch.randn(4, *size, generator=torch.Generator().manual_seed(0)), int8)
        write_tflite(int8, micro)
        return sum(estimator.cycles(micro.read_bytes()))


def main() -> None:
    torch.set_num_threads(1)
    packages = ", ".join(f"{name} {version(name)}" for name in ("ethos-u-vela", "onnxruntime", "timm"))
    print("## Cycles: what the search expects beside Vela's figure for the file\n")
    print(
        f"`python studies/cycles.py`, seed 0, {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores "
        f"(busy with other work), {ACCELERATOR}, {packages}, {STUDENTS} students estimated before.\n"
    )
    print(__doc__.split("\n\n")[2].replace("\n", " ") + "\n")
    print("| student | table | whole | file | table / file | whole / file |\n|---|---|---|---|---|---|")
    estimator, ends = Estimator(ACCELERATOR), []
    for base, side in BASES.items():
        space = nas_kd.Space(
            timm.create_model(base, num_classes=10), img_size=side, name=base, options=parse_options(search_stages=True)
        )
        begun = time.process_time()
        space = space.with_costs(space.costs.with_cycles(estimator))
        spent = time.process_time() - begun
        rows = []
        for name, genotype in chosen(space):
            table = space.table.cost(genotype).cycles
            assert space.costs.cycles is not None
            whole = space.costs.cycles.whole(genotype)
            file = of_file(filled(space.student(genotype)), (3, side, side), estimator)
            rows.append((table, whole, file))
            print(
                f"| {base} {name} | {table:,} | {whole:,} | {file:,} | {table / file:.3f} | {whole / file:.3f} |",
                flush=True,
            )
        table, whole, file = np.array(rows, dtype=float).T
        ends.append(
            f"{base}: the table is {np.abs(table / file - 1).mean():.1%} from the file in the mean, at most "
            f"{np.abs(table / file - 1).max():.1%}; Kendall {kendalltau(table, file)[0]:.2f}, Spearman "
            f"{spearmanr(table, file)[0]:.2f}; whole / file {(whole / file).min():.3f} to {(whole / file).max():.3f}; "
            f"{spent:.0f} s of one core for the table."
        )
    print("\n" + "\n".join(f"- {line}" for line in ends))


if __name__ == "__main__":
    main()
