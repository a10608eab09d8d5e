"""How many genotypes a second the cost tables price, on one core.

    python studies/price_list.py > docs/results/price_list.md

Random genotypes in one array, best of five rounds; params and MACs alone, and with size and peak memory.
"""

from __future__ import annotations

import datetime
import platform
import time

import numpy as np
import timm
import torch

import nas_kd
from nas_kd.budget import COUNTED, KINDS

MODELS = ("resnet18", "resnet50", "mobilenetv2_100", "vgg16_bn", "efficientnet_b0", "densenet121")
GENOTYPES, ROUNDS = 50_000, 5


def per_second(space: nas_kd.Space[torch.nn.Module], kinds: tuple[str, ...]) -> float:
    generator = np.random.default_rng(0)
    rows = np.stack([generator.integers(len(block.choices), size=GENOTYPES) for block in space.blocks], axis=1)
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        space.table.many(rows, kinds)
        times.append(time.process_time() - started)
    return GENOTYPES / min(times)


def main() -> None:
    torch.set_num_threads(1)
    print("# Genotypes priced per second\n")
    print(
        f"`python studies/price_list.py`, seed 0, {datetime.date.today()}, {platform.machine()}, one core (CPU time), "
        f"numpy {np.__version__}, timm {timm.__version__}.\n"
    )
    print("| model | blocks | params and MACs | with size and peak memory |\n|---|---|---|---|")
    for name in MODELS:
        space = nas_kd.Space(timm.create_model(name), name=name)
        two, four = per_second(space, KINDS), per_second(space, COUNTED)
        print(f"| {name} | {len(space.blocks)} | {two:,.0f} | {four:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
