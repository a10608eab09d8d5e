"""The closed forms of flash and ram beside the file and the interpreter's arena, on students of several bases.

    pip install 'nas-kd[mcu]'
    python studies/device_memory.py > docs/results/device.md

Each row is one student: drawn at random, seed 0, the first of each base the base itself. Random weights, since neither
bytes nor arena depend on them; int8 by ONNX Runtime on four random images, then as TensorFlow Lite, run in TensorFlow
Lite Micro on this machine; cycles by Vela. `peak` is the float network's peak_memory / 4, which a budget of bytes of
activations would go by. `same` compares the outputs with those of the int8 ONNX file: steps of rounding, at most.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch

import nas_kd
import nas_kd.models
from nas_kd.networks.int8 import quantise
from nas_kd.networks.micro import MicroInterpreter, compile_file
from nas_kd.networks.onnx import run_onnx, write_model
from nas_kd.networks.tflite import write_tflite

BASES = {
    "cifar_resnet20": 32,
    "mobilenetv2_050": 96,
    "tf_efficientnet_lite0": 96,
    "regnetx_002": 64,
    "mobilenetv3_small_050": 96,
}
EACH = 4
ACCELERATOR = "ethos-u55-128"


@dataclass(frozen=True)
class Row:
    name: str
    flash: tuple[int, int]  # measured, closed form
    ram: tuple[int, int]
    peak: int
    steps: float
    cycles: int


def rows() -> Iterator[Row]:
    for base, side in BASES.items():
        torch.manual_seed(0)
        network = timm.create_model(base, num_classes=10).eval()
        space = nas_kd.Space(network, img_size=side, name=base)
        space = space.with_costs(space.costs.with_device())
        rng = np.random.default_rng(0)
        draws = [[int(rng.integers(len(block.choices))) for block in space.blocks] for _ in range(EACH - 1)]
        for number, genotype in enumerate([space.analysis.identity, *map(space.table.genotype, draws)]):
            cost = space.cost(genotype)
            yield measured(f"{base} {number}", space.student(genotype).eval(), (3, side, side), cost)


def measured(name: str, student: torch.nn.Module, size: tuple[int, int, int], cost: nas_kd.Cost) -> Row:
    images = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        exact, int8, micro = (Path(folder, part) for part in ("float.onnx", "int8.onnx", "int8.tflite"))
        write_model(student, size, exact)
        quantise(exact, images, int8)
        write_tflite(int8, micro)
        interpreter = MicroInterpreter(micro)
        apart = np.abs(interpreter.run(images.numpy()) - run_onnx(int8, images).numpy()).max()
        return Row(
            name=name,
            flash=(micro.stat().st_size, cost.flash),
            ram=(interpreter.arena().total, cost.ram),
            peak=cost.peak_memory // 4,
            steps=float(apart) / interpreter.step,
            cycles=compile_file(micro, ACCELERATOR).cycles,
        )


def main() -> None:
    torch.set_num_threads(1)
    packages = ", ".join(f"{name} {version(name)}" for name in ("tflite-micro", "ethos-u-vela", "onnxruntime", "timm"))
    print("# Flash and ram: the closed form beside the interpreter\n")
    print(f"`python studies/device_memory.py`, seed 0, {datetime.date.today()}, {platform.machine()}, {packages}.\n")
    print(__doc__.split("\n\n")[2].replace("\n", " ") + "\n")
    print("| student | flash | closed form | ratio | ram | closed form | ratio | peak | peak / ram | steps | cycles |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    done: list[Row] = []
    for row in rows():
        done.append(row)
        cells = [
            f"{row.flash[0]:,}", f"{row.flash[1]:,}", f"{row.flash[1] / row.flash[0]:.4f}",
            f"{row.ram[0]:,}", f"{row.ram[1]:,}", f"{row.ram[1] / row.ram[0]:.4f}",
            f"{row.peak:,}", f"{row.peak / row.ram[0]:.2f}", f"{row.steps:.0f}", f"{row.cycles:,}",
        ]  # fmt: skip
        print(f"| {row.name} | {' | '.join(cells)} |", flush=True)
    print()
    for word, ratios in (
        ("flash", [row.flash[1] / row.flash[0] for row in done]),
        ("ram", [row.ram[1] / row.ram[0] for row in done]),
        ("peak_memory / 4 as ram", [row.peak / row.ram[0] for row in done]),
    ):
        middle = statistics.median(ratios)
        print(f"Closed form / measured, {word}: {min(ratios):.4f} to {max(ratios):.4f}, median {middle:.4f}.")


if __name__ == "__main__":
    main()
