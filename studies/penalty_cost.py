"""What the penalty of structure learning adds to a training step (paper A: "negligible training overhead").

    python studies/penalty_cost.py

CPU time of a step with and without the penalty, forwards, backwards and the optimizer's, 64 images, one thread; both
take turns, medians of 10 steps, and of the penalty alone, forwards and backwards.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import timm
import torch
from paper_tables import hardware
from torch import nn

import nas_kd
from nas_kd.budget import parse_budget
from nas_kd.learnt_widths.learning import Goal, WidthLearner
from nas_kd.search.options import parse_options

STEPS, BATCH = 10, 64
BASES = (("cifar_resnet20", None, 32), ("mobilenetv2_100", 8, 32), ("mobilenetv2_100", 8, 16))


def seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def learner_of(model: str, reduction: int | None, side: int) -> WidthLearner:
    torch.manual_seed(0)
    base = timm.create_model(model, num_classes=10)
    if reduction:
        base = nas_kd.reduce_stride(base, reduction, 3)
    space = nas_kd.Space(base, budget="macs=50%", img_size=side, options=parse_options("width"))
    return WidthLearner(base, space.analysis, Goal(budget=parse_budget("macs=50%", space.table.base()), factors={}))


def measured(learner: WidthLearner, side: int) -> tuple[float, float, float]:
    """Seconds of a plain step, of one with the penalty, and of the penalty alone."""
    images, labels = torch.randn(BATCH, 3, side, side), torch.zeros(BATCH, dtype=torch.long)
    optimizer = torch.optim.SGD(learner.network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    learner.train()
    learner.begin(3 * STEPS)

    def step(penalised: bool) -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(learner(images), labels)
        (loss + learner.step().to(loss.dtype) if penalised else loss).backward()
        optimizer.step()

    step(True)
    times = [(seconds(lambda: step(False)), seconds(lambda: step(True))) for _ in range(STEPS)]
    alone = statistics.median(seconds(lambda: learner.step().backward()) for _ in range(STEPS))
    plain, penalised = (statistics.median(column) for column in zip(*times, strict=True))
    return plain, penalised, alone


def main() -> None:
    torch.set_num_threads(1)
    print(f"{hardware()}\n\n| base | pixels | step ms | with the penalty | penalty alone | share |")
    print("|---|---|---|---|---|---|")
    for model, reduction, side in BASES:
        plain, penalised, alone = measured(learner_of(model, reduction, side), side)
        times = " | ".join(f"{1000 * value:.1f}" for value in (plain, penalised, alone))
        print(f"| {model} | {side} | {times} | {alone / plain:.1%} |", flush=True)


if __name__ == "__main__":
    main()
