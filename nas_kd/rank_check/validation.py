"""What a network makes of validation images: its accuracy, and how far it is from the labels and from the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas_kd.data.augment import derive_seed
from nas_kd.data.images import Images, ImageSet
from nas_kd.training.evaluation import predict_logits
from nas_kd.training.losses import distillation_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """`accuracy`, a fraction; `cross_entropy` with the labels and `distillation` (T²·KL from the teacher), in nats."""

    accuracy: float
    cross_entropy: float
    distillation: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Validation:
    """N images that networks are compared on, and the teacher's logits N×K on exactly these."""

    images: Images
    teacher_logits: Tensor
    temperature: float

    def look(self, network: nn.Module) -> Look:
        """Evaluates a network in eval mode, on its own device."""
        logits, labels = predict_logits(network, self.images), self.images.labels.cpu()
        return Look(
            accuracy=(logits.argmax(1) == labels).double().mean().item(),
            cross_entropy=F.cross_entropy(logits, labels).item(),
            distillation=distillation_loss(logits, self.teacher_logits, temperature=self.temperature).item(),
        )


def validation_images(images: ImageSet, count: int, seed: int) -> Images:
    """At most `count` of the images, drawn by `seed` (a data set may be stored class by class)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "validation"))
    return images[torch.randperm(len(images), generator=generator)[:count].sort().values].decoded()


def validation_of(images: ImageSet, teacher: nn.Module, *, count: int, temperature: float, seed: int) -> Validation:
    """Of at most `count` of the images, as `validation_images` draws them."""
    chosen = validation_images(images, count, seed)
    return Validation(images=chosen, teacher_logits=predict_logits(teacher, chosen), temperature=temperature)
