"""What distillation and our loop cost: a KD step beside a plain one, our loop beside a bare one.

    python studies/step_cost.py > docs/results/step_cost.md

Students of cifar_resnet20 and mobilenetv2_100 (reduction 8) at half the width on random 32×32 images: what is timed
does not depend on what is seen. Each round runs all forms one after the other, in an order that turns round; ratios are
within a round, the median over rounds is shown with the lowest and the highest. CPU time on a CPU, wall time on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

import nas_kd.models  # noqa: F401  # registers the CIFAR bases
from nas_kd.analysis.stride_reduction import reduce_stride
from nas_kd.data.augment import Augmentation
from nas_kd.data.images import Images
from nas_kd.search.space import Space
from nas_kd.search.starts import uniform_genotype
from nas_kd.training.evaluation import memory_layout, suits_channels_last
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
from nas_kd.training.views import Views, ViewSpec, build_views

BATCH, TRIALS, TRIAL_EPOCHS = 64, 30, 4
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def bases() -> dict[str, nn.Module]:
    return {
        "cifar_resnet20": timm.create_model("cifar_resnet20").eval(),
        "mobilenetv2_100": reduce_stride(timm.create_model("mobilenetv2_100", num_classes=10), 8, 3).eval(),
    }


def bare_loop(student: nn.Module, views: Views, recipe: Recipe, *, augmented: bool = True) -> None:
    """What one writes by hand: the same batches from a tensor in memory, SGD, KD, a schedule; one epoch.

    Without `augmented` the same batch over and over, already on the device: the network's own speed."""
    device = next(student.parameters()).device
    images = ((views.pixels[0].float() / 255) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    last = suits_channels_last(student)
    if last:
        student.to(memory_format=torch.channels_last)
    images, logits, labels = images.to(device), views.logits[0].float().to(device), views.labels.to(device)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, len(images) // BATCH)
    student.train()
    order = torch.randperm(len(images), device=device)
    for step in range(len(images) // BATCH):
        chosen = order[step * BATCH : (step + 1) * BATCH] if augmented else order[:BATCH]
        output = student(memory_layout(images[chosen], last)).float()
        soft = F.kl_div(
            F.log_softmax(output / 4, 1), F.log_softmax(logits[chosen] / 4, 1), reduction="batchmean", log_target=True
        )
        loss = 0.1 * F.cross_entropy(output, labels[chosen]) + 0.9 * 16 * soft
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def measure(name: str, base: nn.Module, arguments: argparse.Namespace) -> str:
    """One row of the table."""
    device, steps = torch.device(arguments.device), arguments.steps
    space = Space(base, img_size=32, name=name)
    student = space.student(uniform_genotype(space.blocks, 0.5, "standard")).to(device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (steps * BATCH, 3, 32, 32), generator=generator).byte()
    images = Images(pixels, torch.randint(0, 10, (len(pixels),), generator=generator), MEAN, STD)
    recipe = Recipe(epochs=1, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as cache:
        started = clock(device)
        views = build_views(images, base.to(device), ViewSpec(count=1, augmentation=Augmentation()), Path(cache))
        building = clock(device) - started
        forms: dict[str, Callable[[nn.Module], object]] = {
            "plain": lambda network: train(network, replace(views, logits=None), replace(recipe, distill_weight=0.0)),
            "distilled": lambda network: train(network, views, recipe),
            "bare": lambda network: bare_loop(network, views, recipe),
            "constant": lambda network: bare_loop(network, views, recipe, augmented=False),
        }
        times: dict[str, list[float]] = {form: [] for form in forms}
        for turn in range(arguments.rounds + 1):
            for form in sorted(forms, key=list(forms).index, reverse=bool(turn % 2)):
                network = copy.deepcopy(student)
                started = clock(device)
                forms[form](network)
                if turn:  # the first is a warm-up
                    times[form].append(clock(device) - started)
    # all trials of a study see the same views, each of them once in each of its epochs of so many views
    spread = building / (TRIALS * statistics.median(times["plain"]))
    ratios = [
        [kd / plain for kd, plain in zip(times["distilled"], times["plain"], strict=True)],
        [bare / kd for kd, bare in zip(times["distilled"], times["bare"], strict=True)],
        [constant / kd for kd, constant in zip(times["distilled"], times["constant"], strict=True)],
    ]
    shown = [f"{statistics.median(each):.3f} ({min(each):.2f}–{max(each):.2f})" for each in ratios]
    total = statistics.median(ratios[0]) + spread
    speed = steps * BATCH / statistics.median(times["distilled"])
    return f"| {name} | {shown[0]} | {spread:.3f} | {total:.3f} | {shown[1]} | {shown[2]} | {speed:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hardware = platform.machine() if arguments.device == "cpu" else torch.cuda.get_device_name(arguments.device)
    print("# What a distillation step costs, and our loop\n")
    options = f"--device {arguments.device} --steps {arguments.steps} --rounds {arguments.rounds}"
    print(
        f"`python studies/step_cost.py {options}`, seed 0, {datetime.date.today()}, {hardware}, one thread, "
        f"torch {torch.__version__}. Students of half the width, "
        f"batches of {BATCH} images of 32×32, fp32; `cache`: building the views and the teacher's logits, spread over "
        f"{TRIALS} trials that each see every view once. Medians of ratios within a round (lowest–highest).\n"
    )
    print("| base | KD step / plain step | + cache | together | bare loop / ours | constant batch / ours | images/s |")
    print("|---|---|---|---|---|---|---|")
    for name, base in bases().items():
        print(measure(name, base, arguments), flush=True)


if __name__ == "__main__":
    main()
