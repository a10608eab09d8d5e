"""How long the dependency analysis of timm's convolutional families takes: ours, and torch-pruning's.

    python studies/tracers.py > docs/results/tracers.md

Each analysis runs in a process of its own with a limit of 30 s, both in turn for each model, one thread. "groups" are
the sets of coupled channels that torch-pruning finds (`DependencyGraph.get_all_groups`); "calls"
are the convolutions and matrix products whose channels ours labels.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable

MODELS = """
resnet18 resnet50 seresnet50 resnext50_32x4d res2net50_26w_4s resnest26d densenet121 vgg16_bn mobilenetv2_100
mobilenetv3_small_100 efficientnet_b0 tf_efficientnetv2_s mixnet_s ghostnet_100 repvgg_a0 regnety_004 cspresnet50
dla34 hrnet_w18_small inception_v3 rexnet_100 nfnet_l0 convnext_atto fastvit_t8 edgenext_xx_small
""".split()
LIMIT_S = 30


def ours(network: object, size: tuple[int, ...]) -> str:
    from nas_kd.analysis.trace import trace

    return f"{len(trace(network, size).calls)} calls"


def theirs(network: object, size: tuple[int, ...]) -> str:
    import torch
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=torch.randn(1, *size))
    return f"{sum(1 for _ in graph.get_all_groups())} groups"


def measure(name: str, analyse: Callable[[object, tuple[int, ...]], str], answer: object) -> None:
    import timm
    import torch

    torch.set_num_threads(1)
    network = timm.create_model(name).eval()
    size = network.pretrained_cfg["input_size"]
    started = time.perf_counter()
    try:
        found = analyse(network, size)
    except Exception as error:  # a tracer may fail in any way; that is the finding
        found = f"fails: {type(error).__name__}"
    answer.send((time.perf_counter() - started, found))


def limited(name: str, analyse: Callable[[object, tuple[int, ...]], str]) -> str:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=measure, args=(name, analyse, sender))
    process.start()
    answered = receiver.poll(LIMIT_S + 15)  # 15 s to import and to build the network
    text = "{:.2f} s | {}".format(*receiver.recv()) if answered else f"> {LIMIT_S} s | stopped"
    process.kill()
    return text


def main() -> None:
    import timm
    import torch
    import torch_pruning

    print("# Dependency analysis: time per model\n")
    print(
        f"`python studies/tracers.py > docs/results/tracers.md`, {datetime.date.today()}, {platform.machine()}, "
        f"one thread, torch {torch.__version__}, timm {timm.__version__}, torch-pruning {torch_pruning.__version__}.\n"
    )
    print("| model | nas_kd | | torch-pruning | |\n|---|---|---|---|---|")
    for name in MODELS:
        print(f"| {name} | {limited(name, ours)} | {limited(name, theirs)} |")
        sys.stdout.flush()
    print(
        f"\nWall-clock times, on a machine whose load was {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores meanwhile."
    )


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
