"""Which channels to keep: accuracy of narrowed students before any training, by importance measure.

    python studies/importance.py --data-dir cifar10 --initial-checkpoint FILE > docs/results/importance.md

Every block of the base at one width, its own convolutions, batch norms recalibrated on augmented images; with and
without the least-squares fit of the layers that read what is left. Accuracy on validation images, which decide; a
teacher from outside has seen them, so they rank and no more. Taylor: the squared sum over the images of activation
times gradient (Molchanov et al. 2017, arXiv:1611.06440, equation 8). Minutes on one core.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from nas_kd.analysis.structure import Analysis
from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Images, normalise
from nas_kd.data.splits import DataSpec, load_splits
from nas_kd.library.importance import reconstruction_importance
from nas_kd.library.refit import layer_inputs, patch_rows, reference_of, refit
from nas_kd.search.space import Space
from nas_kd.search.starts import uniform_genotype
from nas_kd.students.frames import find_frames, join_batches, recording
from nas_kd.students.inheritance import inherit_student
from nas_kd.students.unit_importance import unit_importance
from nas_kd.training.checkpoint import load_checkpoint
from nas_kd.training.evaluation import evaluate, recalibrate

WIDTHS = (0.75, 0.5, 0.25)
FITTED, CALIBRATION = 256, 512
Order = NDArray[np.float64]


class Ground:
    """A trained base, augmented images, and what passes through the frames of its blocks."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.base = timm.create_model(arguments.model)
        load_checkpoint(self.base, Path(arguments.initial_checkpoint))
        self.base.eval()
        config = self.base.pretrained_cfg
        self.space = Space(self.base, name=arguments.model)
        form = {"img_size": config["input_size"][1], "mean": config["mean"], "std": config["std"], "val_fraction": 0.1}
        with tempfile.TemporaryDirectory() as cache:
            splits = load_splits(DataSpec(dataset="folder", data_dir=arguments.data_dir, **form), Path(cache))
        self.val = splits.val
        self.images = AugmentedImages(splits.train, Augmentation(), 0).sample(CALIBRATION)
        pixels = self.pixels(self.images[:FITTED])
        self.frames = find_frames(self.base, self.analysis, pixels[:2])
        with torch.no_grad(), recording(self.base, self.frames) as recordings:
            self.base(pixels)
        self.recordings = {name: join_batches(parts) for name, parts in recordings.items()}
        self.references = {
            name: reference_of(self.base, self.analysis, self.frames[name], recorded)
            for name, recorded in self.recordings.items()
        }

    @property
    def analysis(self) -> Analysis:
        return self.space.analysis

    @staticmethod
    def pixels(images: Images) -> torch.Tensor:
        return normalise(images.pixels, images.mean, images.std, torch.device("cpu"))

    def accuracy(self, order: Order, width: float, *, fitted: bool) -> float:
        genotype = uniform_genotype(self.space.blocks, width, "standard")
        student = inherit_student(self.base, self.analysis, genotype, importance=order)
        if fitted:
            mask = self.analysis.keep_mask(genotype, order)
            for block in self.space.blocks:
                refit(student, mask, self.references[block.name])
        recalibrate(student, self.images)
        return evaluate(student, self.val)


def of_producers(ground: Ground, score: Callable[[nn.Module, str], torch.Tensor | None]) -> Order:
    """An order from a score of the output channels of the layers that produce them."""
    order = np.zeros(ground.analysis.labels)
    for block in ground.space.blocks:
        for channels in block.channels:
            for path in channels.producers:
                labels = ground.analysis.trace.axes.get(f"{path}.weight", (None,))[0]
                values = score(ground.base.get_submodule(path), path)
                if labels is not None and values is not None:
                    np.add.at(order, labels, values.detach().double().numpy())
    return order


def magnitude(ground: Ground) -> Order:
    return of_producers(ground, lambda layer, path: layer.weight.flatten(1).norm(dim=1))


def gamma(ground: Ground) -> Order:
    norms = ground.analysis.trace.norms
    return of_producers(
        ground, lambda layer, path: ground.base.get_submodule(norms[path]).weight.abs() if path in norms else None
    )


def contribution(ground: Ground) -> Order:
    """Mean square of what a channel holds times its readers' weights, each channel by itself (Wanda)."""
    order = np.zeros(ground.analysis.labels)
    for block in ground.space.blocks:
        frame = ground.frames[block.name]
        for path in frame.edited:
            layer, labels = (
                ground.base.get_submodule(path),
                ground.analysis.trace.axes.get(f"{path}.weight", (None,) * 2),
            )
            if isinstance(layer, nn.Conv2d | nn.Linear) and labels[1] is not None:
                with torch.no_grad():
                    inputs = layer_inputs(frame.inside(ground.base), layer, ground.recordings[block.name])
                    squares = patch_rows(layer, inputs, 16_384).square().mean(0)
                energy = squares * layer.weight.detach().flatten(1).square().sum(0)
                np.add.at(order, labels[1], energy.view(len(labels[1]), -1).sum(1).double().numpy())
    return order


def taylor(ground: Ground) -> Order:
    sums: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    paths = {path for block in ground.space.blocks for channels in block.channels for path in channels.producers}
    norms = ground.analysis.trace.norms

    def keep(path: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(module: nn.Module, arguments: object, output: torch.Tensor) -> None:
            kept[path] = output
            output.retain_grad()

        return hook

    places = {path: ground.base.get_submodule(norms.get(path, path)) for path in paths}
    handles = [module.register_forward_hook(keep(path)) for path, module in places.items()]
    images = ground.images[:FITTED]
    F.cross_entropy(ground.base(ground.pixels(images)), images.labels, reduction="sum").backward()
    for path, output in kept.items():
        assert output.grad is not None
        sums[path] = (output * output.grad).sum((2, 3)).square().sum(0)
    for handle in handles:
        handle.remove()
    ground.base.zero_grad()
    return of_producers(ground, lambda layer, path: sums[path])


MEASURES: dict[str, Callable[[Ground], Order]] = {
    "norm of the weights that produce it": magnitude,
    "batch norm's γ": gamma,
    "norms of the weights that produce and read it": lambda ground: unit_importance(ground.base, ground.analysis),
    "Taylor": taylor,
    "what it contributes by itself": contribution,
    "backward elimination (default)": lambda ground: reconstruction_importance(
        ground.base, ground.analysis, ground.frames, ground.recordings
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--initial-checkpoint", required=True)
    parser.add_argument("--data-dir", required=True, help="image folders")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ground = Ground(arguments)
    print(f"# Which channels to keep: {arguments.model} before any training\n")
    print(
        f"`python studies/importance.py --model {arguments.model} --data-dir … --initial-checkpoint "
        f"{Path(arguments.initial_checkpoint).name}`, {datetime.date.today()}, {platform.machine()}, "
        f"torch {torch.__version__}. Accuracy in % on {len(ground.val):,} validation images (seen by the teacher, "
        f"{100 * evaluate(ground.base, ground.val):.1f} %), inherited → with readers fitted by least squares to "
        f"{FITTED} images.\n"
    )
    print("| channels are ranked by | " + " | ".join(f"width {width}" for width in WIDTHS) + " |")
    print("|---" * (1 + len(WIDTHS)) + "|")
    for name, measure in MEASURES.items():
        order = measure(ground)
        cells = []
        for width in WIDTHS:
            pair = [100 * ground.accuracy(order, width, fitted=fitted) for fitted in (False, True)]
            cells.append(f"{pair[0]:.1f} → {pair[1]:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
