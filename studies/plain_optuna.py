"""What one writes in an afternoon with Optuna and timm alone: a search for a small network, taught by a big one.

    python studies/plain_optuna.py --data-dir cifar10 --teacher resnet18 --checkpoint FILE --macs 12e6 --seconds 600

Nothing here is nas_kd's: studies/versus.py compares with it. As good as we can make it without a library:

- networks of three stages of timm's EfficientNet blocks, inverted residuals or fused ones, with depths, expansions,
  kernel sizes and a growth of the channels to choose; the first stage's channels are then solved for, so that every
  trial has nearly all MACs that are allowed and none has more
- the teacher's logits on augmented images are computed once; timm's `LogitDistillationTask` reads them
- Optuna's multivariate TPE, two sensible starts, successive halving; the best one is trained anew for longer
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import optuna
import timm
import torch
from timm.models import EfficientNet
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

STRIDES = (1, 2, 2)
WIDEST = 128  # channels of the first stage
RUNGS = (1, 2, 4)  # quarters of a trial's images after which it is looked at, and may be stopped
LOOK = 1000  # validation images that a trial is judged by
BATCH = 64
TRIAL_IMAGES = 3200
FINISHED = optuna.trial.TrialState.COMPLETE
STARTS: tuple[dict[str, Any], ...] = (
    {f"{name}{stage}": value for stage in range(3) for name, value in (("type", "ir"), ("depth", 2), ("expand", 4))},
    {f"{name}{stage}": value for stage in range(3) for name, value in (("type", "er"), ("depth", 1), ("expand", 2))},
)


@dataclass(frozen=True)
class Data:
    """Augmented training images, `pixels` V×N×C×H×W uint8 (V times the same N), with `labels` N and the teacher's
    `logits` V×N×K; validation images with labels; how to normalise both, on the scale 0–1."""

    pixels: Tensor
    labels: Tensor
    logits: Tensor
    val_pixels: Tensor
    val_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std))
        return (pixels.float() - mean) / std

    def batches(self, images: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of so many images together, each pass over the data in another order and another view."""
        generator = torch.Generator().manual_seed(seed)
        for view in range(math.ceil(images / len(self.labels))):
            order = torch.randperm(len(self.labels), generator=generator)[: images - view * len(self.labels)]
            for part in torch.split(order, BATCH):
                if len(part) > 1:
                    chosen = view % len(self.pixels), part
                    yield self.pixels[chosen], self.labels[part], self.logits[chosen].float()


class Recorded(nn.Module):
    """A teacher whose logits of the next batch are known."""

    logits: Tensor

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


@dataclass(frozen=True)
class Training:
    """How a network is trained: by SGD with a one-cycle schedule up to `lr`; `amp` is bfloat16."""

    images: int
    lr: float
    seed: int = 0
    amp: bool = False


def distil(network: nn.Module, data: Data, training: Training) -> None:
    """Trains a fresh network in place."""
    for _ in distilling(network, data, training):
        pass


def distilling(network: nn.Module, data: Data, training: Training) -> Iterator[float]:
    """The same, step by step: gives how much of it is done."""
    network.pretrained_cfg = {"mean": data.mean, "std": data.std}
    task = LogitDistillationTask(
        network,
        Recorded(),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=0.1,
        distill_loss_weight=0.9,
        temperature=4.0,
        verbose=False,
    )
    steps = sum(1 for _ in data.batches(training.images, training.seed))
    optimizer = create_optimizer_v2(network, opt="sgd", lr=training.lr, momentum=0.9, weight_decay=5e-4)  # Nesterov
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, total_steps=steps, cycle_momentum=False)
    layout = torch.channels_last if has_groups(network) else torch.contiguous_format  # what is faster
    torch.manual_seed(training.seed)
    task.train()
    for step, (pixels, labels, logits) in enumerate(data.batches(training.images, training.seed)):
        task.teacher.model.logits = logits
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.amp):
            loss = task(data.normalise(pixels).contiguous(memory_format=layout), labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield (step + 1) / steps
    network.eval()


def has_groups(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in network.modules())


@torch.inference_mode()
def accuracy(network: nn.Module, data: Data, count: int) -> float:
    network.eval()
    right = 0
    for pixels, labels in zip(data.val_pixels[:count].split(256), data.val_labels[:count].split(256), strict=True):
        right += int((network(data.normalise(pixels)).argmax(1) == labels).sum())
    network.train()
    return right / min(count, len(data.val_labels))


def macs_of(network: nn.Module, size: tuple[int, ...]) -> int:
    """Half of what torch's flop counter counts, on the meta device."""
    network = network.to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *size, device="meta"))
    return counter.get_total_flops() // 2


def make(params: dict[str, Any], width: int, size: tuple[int, ...], classes: int) -> EfficientNet:
    """The network of a trial's parameters, `width` channels wide in its first stage."""
    stages, channels = [], float(width)
    for stage, stride in enumerate(STRIDES):
        channels *= params["growth"] if stage else 1
        kind, depth, expand = (params[f"{name}{stage}"] for name in ("type", "depth", "expand"))
        kernel = params["kernel"] if kind == "ir" else 3
        stages.append([f"{kind}_r{depth}_k{kernel}_s{stride}_e{expand}_c{round(channels)}"])
    network = EfficientNet(
        decode_arch_def(stages),
        num_classes=classes,
        in_chans=size[0],
        stem_size=round_channels(width, divisor=4),
        num_features=round_channels(channels * params["head"], divisor=4),
        round_chs_fn=functools.partial(round_channels, divisor=4),
        act_layer=nn.ReLU,
    )
    network.conv_stem.stride = (1, 1)  # the images are small
    return network


def widest(params: dict[str, Any], macs: float, size: tuple[int, ...], classes: int) -> int | None:
    """The largest width within the MACs, by bisection; None where even the narrowest network has more."""
    fits, too_wide = 0, WIDEST + 1
    while too_wide - fits > 1:
        middle = (fits + too_wide) // 2
        within = macs_of(make(params, middle, size, classes), size) <= macs
        fits, too_wide = (middle, too_wide) if within else (fits, middle)
    return fits or None


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for stage in range(len(STRIDES)):
        params[f"type{stage}"] = trial.suggest_categorical(f"type{stage}", ("ir", "er"))
        params[f"depth{stage}"] = trial.suggest_int(f"depth{stage}", 1, 4)
        params[f"expand{stage}"] = trial.suggest_categorical(f"expand{stage}", (1, 2, 3, 4, 6))
    params["kernel"] = trial.suggest_categorical("kernel", (3, 5))
    params["growth"] = trial.suggest_float("growth", 1.0, 2.5)
    params["head"] = trial.suggest_categorical("head", (1, 2, 4))
    params["lr"] = trial.suggest_float("lr", 0.03, 0.5, log=True)
    return params


@dataclass(frozen=True)
class Found:
    """The best parameters of a search, the width that goes with them, and how many trials it had."""

    params: dict[str, Any]
    width: int
    trials: int


@dataclass(frozen=True)
class Search:
    """A search for networks within `macs`, trials of at most `training.images`, for `seconds` of CPU time."""

    macs: float
    seconds: float
    training: Training

    def run(self, data: Data) -> Found:
        """Searches until the time is over; a trial that is under way then is the last one."""
        started = time.process_time()
        size, classes = tuple(data.pixels.shape[2:]), data.logits.shape[-1]

        def objective(trial: optuna.Trial) -> float:
            params = suggest(trial)
            width = widest(params, self.macs, size, classes)
            if width is None:
                raise optuna.TrialPruned
            trial.set_user_attr("width", width)
            torch.manual_seed(self.training.seed)
            return self._train(trial, make(params, width, size, classes), params["lr"], data)

        def stop(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            if time.process_time() - started > self.seconds and study.get_trials(states=(FINISHED,)):
                study.stop()

        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(multivariate=True, n_startup_trials=8, seed=self.training.seed),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        )
        for start in STARTS:
            study.enqueue_trial(start)
        study.optimize(objective, n_trials=1000, callbacks=[stop])
        best = study.best_trial
        return Found(best.params, best.user_attrs["width"], len(study.trials))

    def _train(self, trial: optuna.Trial, network: nn.Module, lr: float, data: Data) -> float:
        training = Training(self.training.images, lr, self.training.seed, self.training.amp)
        left, score = list(RUNGS), 0.0
        for done in distilling(network, data, training):
            if left and done >= left[0] / RUNGS[-1]:
                score = accuracy(network, data, LOOK)
                trial.report(score, left.pop(0))
                if left and trial.should_prune():
                    raise optuna.TrialPruned
        return score


def build(found: Found, size: tuple[int, ...], classes: int, seed: int) -> EfficientNet:
    """The network that was found, with fresh weights."""
    torch.manual_seed(seed)
    return make(found.params, found.width, size, classes)


def load(folder: str, split: str) -> tuple[Tensor, Tensor]:
    images = ImageFolder(f"{folder}/{split}")
    return torch.stack([pil_to_tensor(image) for image, _ in images]), torch.tensor(images.targets)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops after zero padding by an eighth, and mirror images."""
    side = pixels.shape[-1]
    padded = nn.functional.pad(pixels, [side // 8] * 4)
    rows, columns = torch.randint(side // 4 + 1, (2, len(pixels)), generator=generator)
    cut = [p[:, r : r + side, c : c + side] for p, r, c in zip(padded, rows, columns, strict=True)]
    flips = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(flips[:, None, None, None], torch.stack(cut).flip(3), torch.stack(cut))


@torch.no_grad()
def recorded(teacher: nn.Module, data: Data) -> Data:
    """The data with the logits that a teacher gives for its views."""
    teacher.eval()
    views = [torch.cat([teacher(data.normalise(part)) for part in view.split(256)]) for view in data.pixels]
    return replace(data, logits=torch.stack(views))


def read(arguments: argparse.Namespace) -> tuple[Data, Data]:
    """What to train and select on, a tenth of the training images; and what to test on."""
    generator = torch.Generator().manual_seed(0)
    pixels, labels = load(arguments.data_dir, "train")
    order = torch.randperm(len(labels), generator=generator)
    train, val = order[len(order) // 10 :], order[: len(order) // 10]
    teacher = timm.create_model(
        arguments.teacher, num_classes=int(labels.max()) + 1, checkpoint_path=arguments.checkpoint
    )
    how = teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"]
    views = torch.stack([augment(pixels[train], generator) for _ in range(arguments.views)])
    bare = Data(views, labels[train], torch.empty(0), pixels[val], labels[val], *how)
    test = Data(*[torch.empty(0)] * 3, *load(arguments.data_dir, "test"), *how)
    return recorded(teacher, bare), test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", required=True, help="image folders: train/CLASS/*.png, test/CLASS/*.png, all of one size")
    add("--teacher", default="resnet18", help="timm model")
    add("--checkpoint", required=True, help="its weights")
    add("--macs", type=float, required=True)
    add("--seconds", type=float, default=600, help="of CPU time for the search (600)")
    add("--images", type=int, default=200_000, help="training images of the final network (200,000)")
    add("--views", type=int, default=2, help="augmented copies of the training images (2)")
    arguments = parser.parse_args()
    data, test = read(arguments)
    found = Search(arguments.macs, arguments.seconds, Training(TRIAL_IMAGES, 0.1)).run(data)
    network = build(found, tuple(data.pixels.shape[2:]), data.logits.shape[-1], seed=0)
    distil(network, data, Training(arguments.images, found.params["lr"]))
    print(f"{found.params}, width {found.width}, {found.trials} trials")
    print(f"test accuracy {100 * accuracy(network, test, len(test.val_labels)):.2f} %")
    torch.save(network.state_dict(), "plain_optuna.pt")


if __name__ == "__main__":
    main()
