"""What a library costs by stage, and how good its solutions are: CPU-seconds, peak memory, accuracy as assembled.

    python studies/library_cost.py --data-dir photos [--model NAME] [--weights FILE] [--pixels 96] [--rows FILE]

The teacher is the base with weights (tensors in the order of timm's), its batch norms anchored to the photos, and a
logistic regression in place of its head; nothing is trained. A library of it is built in closed form, and the
knapsack's solutions at each `--shares` of the MACs are recalibrated and looked at on the test images. A row is kept in
`--rows` under its arguments and `--label`; what is there is not run again. Peak memory is what the process needed
beyond what it held before the library was begun. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas_kd.budget import parse_budget
from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.data.splits import DataSpec, Splits, load_splits
from nas_kd.library.building import LibrarySpec, build_library
from nas_kd.library.library import Library
from nas_kd.search.options import parse_options
from nas_kd.search.solver import solve
from nas_kd.search.space import Space
from nas_kd.training.evaluation import evaluate, predict_logits, recalibrate
from nas_kd.training.losses import distillation_loss

ANCHORING, CALIBRATION, TEMPERATURE = 512, 512, 4.0
STAGES = ("importance", "inherited", "trained", "measured")  # a word of what each stage reports


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The knapsack's student at a share of the MACs: its summed damages, and as assembled and recalibrated T²·KL from
    the teacher on held-out images and accuracy on the test images."""

    share: float
    predicted: float
    kl: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One library: CPU-seconds by stage, all in all by the wall's clock, peak memory in MB, and its solutions."""

    entries: int
    cpu: dict[str, float]
    wall: float
    memory: float
    teacher: float
    solutions: tuple[Solution, ...]


class Stopwatch:
    """CPU-seconds by stage, from what a library reports."""

    def __init__(self) -> None:
        self.cpu = dict.fromkeys(STAGES, 0.0)
        self.last = time.process_time()

    def report(self, words: str) -> None:
        stage = next((stage for stage in STAGES if stage in words), STAGES[0])
        if not self.cpu["importance"] and stage == "inherited":  # a library that says nothing before that
            stage = "importance"
        now = time.process_time()
        self.cpu[stage] += now - self.last
        self.last = now


def load_weights(network: nn.Module, file: Path) -> None:
    """Gives a network the tensors of a file that stand in the same order, all but a head of other classes."""
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    state = network.state_dict()
    pairs = zip(state.items(), loaded.values(), strict=True)
    network.load_state_dict({name: new if new.shape == old.shape else old for (name, old), new in pairs})


@torch.no_grad()
def anchor(network: nn.Module, images: Images) -> None:
    """Gives every batch norm the statistics of these images and leaves what it computes in eval mode as it was."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    sums: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen = arguments[0].transpose(0, 1).flatten(1)
        sums[module].append(torch.stack([seen.mean(1), seen.square().mean(1)]))

    with contextlib.ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(keep).remove)
        predict_logits(network, images)
    for norm in norms:
        mean, square = torch.stack(sums[norm]).mean(0).clone()
        variance = (square - mean.square()).clamp_min(1e-10)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias += gain * (mean - norm.running_mean)
        norm.weight.copy_(gain * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def add_probe(network: nn.Module, images: Images) -> None:
    """Makes the head of a network a logistic regression on its frozen features."""
    head: nn.Linear = network.get_classifier()  # type: ignore[operator]
    classes = int(images.labels.max()) + 1
    network.reset_classifier(0)  # type: ignore[operator]
    features = predict_logits(network, images)
    network.reset_classifier(classes)  # type: ignore[operator]
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    rows = (features - mean) / scale
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(rows @ weight.T + bias, images.labels) + 0.05 * weight.square().sum() / len(rows) ** 0.5
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[arg-type, no-untyped-call]
    head = network.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - (weight / scale) @ mean)


def make_teacher(arguments: argparse.Namespace, splits: Splits) -> nn.Module:
    """The base with its weights, anchored, with a probe as its head; without weights as timm draws it."""
    torch.manual_seed(arguments.seed)
    network: nn.Module = timm.create_model(arguments.model)
    if arguments.weights:
        load_weights(network, Path(arguments.weights))
    anchor(network.eval(), augmented(splits, arguments).sample(ANCHORING))
    add_probe(network, splits.train)
    return network.eval().requires_grad_(False)


def augmented(splits: Splits, arguments: argparse.Namespace) -> AugmentedImages:
    """The training images as libraries see them."""
    return AugmentedImages(splits.train, Augmentation(), arguments.seed)


def read_splits(arguments: argparse.Namespace, cache: Path) -> Splits:
    """The photos at the size that was asked for."""
    config = timm.create_model(arguments.model, num_classes=2).pretrained_cfg
    spec = DataSpec(
        dataset="folder",
        data_dir=arguments.data_dir,
        img_size=arguments.pixels,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        train_images=arguments.images,
        seed=arguments.seed,
    )
    return load_splits(spec, cache)


def peak_bytes() -> int:
    """The most memory that the process has had, since `forget_peak` where that works."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> int:
    """Begins to look for the peak anew (Linux); the bytes that the process has now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def measure(arguments: argparse.Namespace, cache: Path) -> Row:
    """Builds the library and looks at its solutions."""
    splits = read_splits(arguments, cache)
    teacher = make_teacher(arguments, splits)
    space = Space(teacher, img_size=arguments.pixels, options=parse_options(arguments.space), name=arguments.model)
    rounds = tuple(arguments.steps)
    spec = LibrarySpec(rounds=rounds, seed=arguments.seed, anchor=False)
    images = augmented(splits, arguments).sample(spec.images + spec.holdout)
    before, watch, started = forget_peak(), Stopwatch(), time.monotonic()
    library = build_library(teacher, space.analysis, images, spec, cache, watch.report)
    row = Row(
        entries=len(library.entries),
        cpu=watch.cpu,
        wall=time.monotonic() - started,
        memory=(peak_bytes() - before) / 1e6,
        teacher=evaluate(teacher, splits.test),
        solutions=(),
    )
    solutions = tuple(assembled(share, space, library, splits, arguments) for share in arguments.shares)
    return Row(**{**{name: getattr(row, name) for name in Row.__slots__}, "solutions": solutions})


def assembled(
    share: float, space: Space[nn.Module], library: Library, splits: Splits, arguments: argparse.Namespace
) -> Solution:
    """The knapsack's solution at a share of the base's MACs."""
    damages = library.damages()
    genotype = solve(space.table, parse_budget(f"macs={100 * share:g}%", space.base_cost()), damages)
    assert genotype is not None
    predicted = sum(float(own[b.choices.index(genotype[b.name])]) for own, b in zip(damages, space.blocks, strict=True))
    student = library.student(genotype)
    recalibrate(student, augmented(splits, arguments).sample(CALIBRATION))
    logits = [predict_logits(network, splits.val) for network in (student, space.base)]
    kl = float(distillation_loss(logits[0], logits[1], temperature=TEMPERATURE))
    return Solution(share=share, predicted=predicted, kl=kl, accuracy=evaluate(student, splits.test))


def rows_of(file: Path | None) -> dict[str, Any]:
    """The rows that were measured before, by their keys."""
    if file is None or not file.exists():
        return {}
    return {record.pop("key"): record for record in map(json.loads, file.read_text().splitlines())}


def key_of(arguments: argparse.Namespace) -> str:
    """What a row is of, in words."""
    steps = f", {sum(arguments.steps)} steps" if arguments.steps else ""
    weights = "" if arguments.weights else ", random"
    return (
        f"{arguments.label}: {arguments.model}{weights}, {arguments.pixels} px, {arguments.images} images, "
        f"{arguments.space}{steps}, seed {arguments.seed}"
    )


def page(rows: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| library | entries | importance | closed form | trained | damages | CPU-s | wall s | peak MB | teacher % | "
        "as assembled: % (KL, predicted) |",
        "|" + "---|" * 11,
    ]
    for key, row in rows.items():
        cpu = row["cpu"]
        solved = "; ".join(
            f"{100 * s['share']:.0f} % of the MACs: {100 * s['accuracy']:.1f} ({s['kl']:.2f}, {s['predicted']:.2f})"
            for s in row["solutions"]
        )
        seconds = " | ".join(f"{cpu[stage]:.0f}" for stage in STAGES)
        lines.append(
            f"| {key} | {row['entries']} | {seconds} | {sum(cpu.values()):.0f} | {row['wall']:.0f} | "
            f"{row['memory']:.0f} | {100 * row['teacher']:.1f} | {solved} |"
        )
    where = f"torch {torch.__version__}; {platform.machine()}, {os.cpu_count()} cores; {datetime.date.today()}."
    return "\n".join(["# What a library costs", "", where, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", metavar="FILE", help="pretrained tensors in the order of timm's")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--space", default="width,kernel,conv")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="training steps of each round (none)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="now")
    parser.add_argument("--rows", type=Path, help="a file that keeps the rows")
    arguments = parser.parse_args()
    rows = rows_of(arguments.rows)
    if key_of(arguments) not in rows:
        with tempfile.TemporaryDirectory() as cache:
            row = asdict(measure(arguments, Path(cache)))
        rows[key_of(arguments)] = json.loads(json.dumps(row))
        if arguments.rows is not None:
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key_of(arguments), **row}) + "\n")
    print(page(rows))


if __name__ == "__main__":
    main()
