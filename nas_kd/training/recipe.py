"""How a network is trained, as a value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import nn

from nas_kd.errors import TrainingError, nearest
from nas_kd.training.losses import SOFT_LOSSES, SoftLoss, soft_loss

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("one-cycle", "cosine", "step", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Every number of a training, the seed included; the device and the data are not part of it.

    `lr` is the peak; students that inherit weights need a small one (0.005 with SGD), at 0.05 and more what they
    inherited is destroyed. `warmup` is the share of the steps in which a one-cycle schedule rises; `step` is ×0.1 at
    one half and at three quarters of the steps. `distill` names the soft loss (`losses.soft_loss`), `dkd_alpha`,
    `dkd_beta` and `class_mean` are its options; `distill_weight` is its share: 0 is plain training, 1 looks at the
    teacher only. Online distillation weighs everything 1 instead, and `teacher_gradient` is its switch
    (`losses.ensemble_loss`). `amp` is bfloat16 where there is any. `channels_last` None leaves the memory layout to the
    network (`evaluation.suits_channels_last`). `ema` is the decay of a moving average of the weights, 0 for none.
    `eval_epochs` count from 1; the last epoch is always one of them.
    Raises TrainingError for a value outside its range.
    """

    epochs: int
    batch_size: int = 64
    lr: float = 0.005
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "one-cycle"
    warmup: float = 0.3
    distill: str = "kd"
    distill_weight: float = 0.9
    temperature: float = 4.0
    dkd_alpha: float = 1.0
    dkd_beta: float = 8.0
    class_mean: bool = False
    teacher_gradient: bool = False
    amp: bool = False
    channels_last: bool | None = None
    ema: float = 0.0
    seed: int = 0
    eval_epochs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("distill", SOFT_LOSSES)):
            value = getattr(self, name)
            if value not in known:
                raise TrainingError(f"unknown {name} {value!r}: use {' or '.join(known)}{nearest(value, known)}")
        for name, fine, legal in self._ranges():
            if not fine:
                raise TrainingError(f"{name} must be {legal}, got {getattr(self, name)!r}")

    def _ranges(self) -> Iterable[tuple[str, bool, str]]:
        yield "epochs", self.epochs >= 1, "at least 1"
        yield "batch_size", self.batch_size >= 2, "at least 2 (batch norm)"
        yield "lr", 0 < self.lr < math.inf, "positive"
        yield "momentum", 0 <= self.momentum < 1, "in [0, 1)"
        yield "weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"
        yield "warmup", 0 <= self.warmup < 1, "in [0, 1)"
        yield "distill_weight", 0 <= self.distill_weight <= 1, "in [0, 1]"
        yield "temperature", 0 < self.temperature < math.inf, "positive"
        for name in ("dkd_alpha", "dkd_beta"):
            yield name, 0 <= getattr(self, name) < math.inf, "0 or more"
        yield "ema", 0 <= self.ema < 1, "in [0, 1)"
        yield "eval_epochs", all(1 <= epoch <= self.epochs for epoch in self.eval_epochs), f"in 1–{self.epochs}"

    def evaluates(self, epoch: int) -> bool:
        """Whether the student is evaluated after `epoch` (from 1)."""
        return epoch == self.epochs or epoch in self.eval_epochs

    def learning_rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0) of `steps`: by default a cosine up to `lr`, a cosine down to 0."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "step":
            return self.lr * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))
        rise = int(self.warmup * steps) if self.schedule == "one-cycle" else 0
        if step < rise:
            return self.lr * (1 - math.cos(math.pi * (step + 1) / (rise + 1))) / 2
        return self.lr * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser; biases and norms (fewer than 2 dimensions) get no weight decay, as in timm."""
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # one kernel for all parameters: 4 ms instead of 9 for ResNet-18 on two cores, of a step of 55
        fused = parameters[0].device.type in ("cpu", "cuda")
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, fused=fused)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0, fused=fused)

    def make_soft_loss(self) -> SoftLoss:
        """What draws a student to its teacher."""
        return soft_loss(
            self.distill,
            temperature=self.temperature,
            alpha=self.dkd_alpha,
            beta=self.dkd_beta,
            class_mean=self.class_mean,
        )

    def make_average(self, student: nn.Module) -> ModelEmaV3 | None:
        """timm's moving average of the weights, or None; its decay warms up, so that short trainings profit too."""
        return ModelEmaV3(student, decay=self.ema, use_warmup=True) if self.ema else None
