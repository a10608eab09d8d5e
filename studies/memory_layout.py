"""Training steps with channels first and channels last in memory, side by side on this machine's CPU.

    python studies/memory_layout.py > docs/results/memory_layout.md

Each row is one network; both layouts take turns, one thread, 64 images a step, CPU time, best of 8 steps.
"""

from __future__ import annotations

import datetime
import platform
import time

import timm
import torch
from torch import nn

import nas_kd

STEPS, BATCH = 8, 64


def seconds_per_step(network: nn.Module, images: torch.Tensor, layout: torch.memory_format) -> float:
    network = network.to(memory_format=layout).train()
    images = images.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    started = time.process_time()
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.long)).backward()
    optimizer.step()
    return time.process_time() - started


def networks() -> list[tuple[str, nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    mobile = nas_kd.reduce_stride(timm.create_model("mobilenetv2_100", num_classes=10), 8, 3)
    resnet = timm.create_model("resnet18", num_classes=10, in_chans=1)
    small, large = torch.randn(BATCH, 1, 16, 16), torch.randn(BATCH, 3, 32, 32)
    rows = [("mobilenetv2_100 at 3×32×32, reduction 8", mobile, large), ("resnet18 at 1×16×16", resnet, small)]
    space = nas_kd.Space(resnet, budget="params=1M", img_size=16)
    for genotype in space.starts(8)[::2]:
        kinds = sorted({str(choice.conv) for choice in genotype.values()})
        rows.append(
            (
                f"its student of {space.cost(genotype).params:,} params: {', '.join(kinds)}",
                space.student(genotype),
                small,
            )
        )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    print("# Memory layout: milliseconds of a training step\n")
    print(
        f"`python studies/memory_layout.py`, seed 0, {datetime.date.today()}, {platform.machine()}, one thread, "
        f"torch {torch.__version__}, timm {timm.__version__}.\n"
    )
    print("| network | channels first | channels last | first / last |\n|---|---|---|---|")
    for name, network, images in networks():
        layouts = (torch.contiguous_format, torch.channels_last)
        times = [[seconds_per_step(network, images, layout) for layout in layouts] for _ in range(STEPS)]
        first, last = (1000 * min(column) for column in zip(*times, strict=True))
        print(f"| {name} | {first:.0f} | {last:.0f} | {first / last:.2f} |", flush=True)


if __name__ == "__main__":
    main()
