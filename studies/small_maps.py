"""What it saves to leave out the taps of a kernel that no pixel meets (`training/small_maps.py`): a training step.

    python studies/small_maps.py > docs/results/small_maps.md

Random images: what is timed does not depend on what is seen. Both ways take turns, CPU time on one thread, the least of
a few steps each.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from collections.abc import Iterator

import timm
import torch
from torch import nn
from torch.nn import functional as F

from nas_kd.training.evaluation import memory_layout, suits_channels_last
from nas_kd.training.small_maps import reached_taps

BATCH, STEPS, ROUNDS = 32, 4, 3
NETWORKS = (
    ("resnet18", 1, 16),
    ("resnet18", 3, 32),
    ("resnet50", 3, 32),
    ("mobilenetv2_100", 3, 32),
    ("mobilenetv3_small_100", 3, 32),
    ("regnetx_002", 3, 32),
    ("resnet18", 3, 64),
    ("resnet18", 3, 128),
)
CONVOLUTIONS = ((512, 3, 1, 1), (256, 3, 1, 1), (512, 3, 512, 1), (512, 5, 512, 1), (256, 5, 1, 2), (256, 3, 1, 2))


def step_seconds(network: nn.Module, images: torch.Tensor) -> float:
    """The least CPU seconds of a step forward and back."""
    found = []
    for _ in range(STEPS):
        started = time.process_time()
        torch.autograd.backward(network(images).square().mean())
        found.append(time.process_time() - started)
        network.zero_grad(set_to_none=True)
    return min(found)


def both(network: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of a step with all taps, and with those that are met."""
    ways: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for own, way in zip(ways, (contextlib.nullcontext(), reached_taps(network)), strict=True):
            with way:
                own.append(step_seconds(network, images))
    return 1e3 * min(ways[0]), 1e3 * min(ways[1])


def apart(network: nn.Module, images: torch.Tensor) -> float:
    """The largest difference of an output, over the largest output."""
    with torch.inference_mode():
        wanted = network.eval()(images)
        with reached_taps(network):
            got = network(images)
    network.train()
    return float((got - wanted).abs().max() / wanted.abs().max())


def rows() -> Iterator[str]:
    torch.manual_seed(0)
    for channels, kernel, groups, size in CONVOLUTIONS:
        module = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups)
        images = F.relu(torch.randn(BATCH, channels, size, size))
        yield row(f"{kernel}×{kernel}, {channels} channels, {groups} groups, on {size}×{size}", module, images)
    for name, channels, size in NETWORKS:
        network = timm.create_model(name, in_chans=channels, num_classes=10).train()
        last = suits_channels_last(network)
        if last:
            network.to(memory_format=torch.channels_last)
        images = memory_layout(torch.randn(BATCH, channels, size, size), last)
        yield row(f"{name} at {channels}×{size}×{size}", network, images)


def row(what: str, network: nn.Module, images: torch.Tensor) -> str:
    error, (full, met) = apart(network, images), both(network, images)
    return f"| {what} | {full:.1f} | {met:.1f} | {full / met:.2f} | {error:.0e} |"


def main() -> None:
    torch.set_num_threads(1)
    print("# Taps that no pixel meets: milliseconds of a training step\n")
    print(
        f"`python studies/small_maps.py`, seed 0, {datetime.date.today()}, {platform.machine()} "
        f"({torch.backends.cpu.get_cpu_capability()}), one thread, batches of {BATCH}, torch {torch.__version__}, "
        f"timm {timm.__version__}.\n"
    )
    print("| | all taps | those that are met | times as fast | outputs apart |\n|---|---|---|---|---|")
    for line in rows():
        print(line, flush=True)


if __name__ == "__main__":
    main()
