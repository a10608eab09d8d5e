"""The trainings that `test_ranks` compares; run as a script it is one of two processes that share them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.torchrun import led
from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages
from nas_kd.data.splits import DataSpec, load_splits
from nas_kd.errors import TrainingError
from nas_kd.training import step_memory
from nas_kd.training.loop import Run, train
from nas_kd.training.online import train_online
from nas_kd.training.recipe import Recipe

SPEC = DataSpec(img_size=32, in_chans=1, train_images=160)
RECIPE = Recipe(epochs=2, batch_size=54, lr=0.002, distill_weight=0, ema=0.5, eval_epochs=(1,))  # 160: 54, 53, 53
SHARED = Run(shared=True)


def network(seed: int = 0, norm: str = "batchnorm") -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=10, norm_layer=norm)
    return made


def trained(
    folder: Path,
    recipe: Recipe = RECIPE,
    run: Run = SHARED,
    report: Callable[[int], object] = int,
    norm: str = "batchnorm",
    device: str = "cpu",
) -> nn.Module:
    splits, student = load_splits(SPEC, folder), network(norm=norm).to(device)
    data = AugmentedImages(splits.train, Augmentation(flip=False))
    train(student, data, recipe, val=splits.val, report=lambda epoch, _: report(epoch), run=run)
    return student


def in_pieces(folder: Path) -> nn.Module:
    """Batches of 160 images, of which each of two processes has 80, in pieces of 40."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_memory, "STEP_BYTES", 1)
        return trained(folder, replace(RECIPE, batch_size=160, ema=0.0), norm="groupnorm1")


def resumed(folder: Path, drafts: Path) -> nn.Module:
    """What goes on from the state after the first of two epochs."""
    state, kept = drafts / "state", drafts / "kept"
    trained(folder, run=replace(SHARED, checkpoint=state), report=lambda epoch: epoch == 1 and shutil.copy(state, kept))
    return trained(folder, run=replace(SHARED, checkpoint=kept))


def online(folder: Path) -> nn.Module:
    splits = load_splits(SPEC, folder)
    data = AugmentedImages(splits.train, Augmentation(flip=False))
    return train_online([network(0), network(1)], data, RECIPE, val=splits.val, run=SHARED).ensemble


def diverged(folder: Path) -> str:
    try:
        trained(folder, replace(RECIPE, lr=1e30, schedule="constant", ema=0.0))
    except TrainingError as error:
        return str(error)
    return ""


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def far(one: nn.Module, two: dict[str, Tensor], start: nn.Module) -> float:
    """How far two networks are from each other, as a share of the way that they have come from the start."""
    names = sorted(name for name, tensor in one.state_dict().items() if tensor.is_floating_point())
    here, there, before = (
        torch.cat([weights[name].double().flatten() for name in names])
        for weights in (tensors(one), two, tensors(start))
    )
    return float((here - there).norm() / (here - before).norm())


def main(arguments: Sequence[str]) -> int:
    """Trains everything, writes the weights, and is killed in the middle of one more training."""
    data, drafts = map(Path, arguments)
    made = {"whole": trained(data)}
    message = diverged(data)
    assert "the loss became" in message, message
    made |= {
        "again": trained(data),
        "pieces": in_pieces(data),
        "resumed": resumed(data, drafts),
        "online": online(data),
    }
    for name, module in made.items():
        save_file(tensors(module), drafts / f"{name}.safetensors")
    trained(data, report=lambda epoch: os.kill(os.getpid(), signal.SIGKILL))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(led(main), None))
