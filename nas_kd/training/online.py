"""Online distillation: students and a teacher built from them learn together, and nothing is pre-trained.

"Compressing CNNs with cheap convolutions and online distillation" (arXiv 1909.13063). Where its authors' code does
otherwise there is a switch, or we say so in docs/papers.md.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas_kd.data.augment import derive_seed
from nas_kd.data.images import ImageSet, TrainingData, normalise
from nas_kd.errors import ModelError, TrainingError
from nas_kd.training.evaluation import device_of, eval_mode, predict_logits
from nas_kd.training.loop import Run, Task, TrainResult, fit, ignore
from nas_kd.training.losses import ensemble_loss
from nas_kd.training.recipe import Recipe

PEERS = 4  # students that learn together: m in the paper


class OnlineTeacher(nn.Module):
    """Concatenated feature maps → batch norm → ReLU → global average pool → one linear layer → logits z_t.

    N×C×H×W → N×K, where C counts the channels of all students together.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.act(self.norm(features)).mean(dim=(2, 3)))
        return logits


class Ensemble(nn.Module):
    """m students whose weights are not shared, and the teacher on top of their last feature maps.

    N×C×H×W → N×(m+1)×K: the students' logits z_1 … z_m, and last the teacher's z_t. `channels` are those of all
    feature maps together.
    """

    def __init__(self, students: Sequence[nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        self.teacher = OnlineTeacher(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        features, logits = zip(*(features_and_logits(student, images) for student in self.students), strict=True)
        return torch.stack((*logits, self.teacher(torch.cat(features, dim=1))), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnlineResult:
    """What came of it: the trained `ensemble`, in eval mode; `accuracies`, the validation accuracy (fraction) of each
    student and last of the teacher; `training`, whose accuracies are those of the best student at the time."""

    ensemble: Ensemble
    accuracies: tuple[float, ...]
    training: TrainResult

    @property
    def best(self) -> int:
        """The number of the student that was best on the validation images, the first one of equals."""
        students = self.accuracies[:-1]
        return students.index(max(students))

    @property
    def student(self) -> nn.Module:
        """That student itself."""
        return self.ensemble.students[self.best]


def train_online(
    students: Sequence[nn.Module],
    data: TrainingData,
    recipe: Recipe,
    *,
    val: ImageSet,
    report: Callable[[int, float], None] = ignore,
    run: Run | None = None,
) -> OnlineResult:
    """Trains `students` in place, together with the teacher that is built from them, by the `ensemble_loss`.

    All else is as in `loop.fit`: `report` hears the validation accuracy of the best student. Logits of a finished
    teacher in `data` are not used. Every student sees the same batches, so they have to start from different weights.
    Raises what `make_ensemble` and `fit` raise.
    """
    two = normalise(data.batch(0, torch.arange(2)).pixels, data.mean, data.std, device_of(nn.ModuleList(students)))
    ensemble = make_ensemble(students, two, seed=recipe.seed)
    task = Task(
        network=ensemble,
        criterion=functools.partial(
            ensemble_loss, soft=recipe.make_soft_loss(), teacher_gradient=recipe.teacher_gradient
        ),
        measure=lambda network: max(accuracies(network, val)[:-1]),
        recordable=True,
    )
    training = fit(task, data, recipe, report=report, run=run or Run())
    return OnlineResult(ensemble=ensemble, accuracies=accuracies(ensemble, val), training=training)


def make_ensemble(students: Sequence[nn.Module], images: Tensor, *, seed: int = 0) -> Ensemble:
    """Some students and a new teacher over their feature maps, for online distillation (arXiv 1909.13063, section 3).

    For a training loop of your own: descend on `ensemble_loss(ensemble(images), labels, soft=…)`.

    Args:
        students: Two or more, with the same classes.
        images: Of the kind that they take, N×C×H×W: the teacher is made for their feature maps.
        seed: Of the teacher's weights.

    Returns:
        A module: images N×C×H×W → logits N×(m+1)×K, of the m students and, last, of the teacher.

    Raises:
        TrainingError: For fewer than 2 students, equal ones, or other classes.
        ModelError: For a network without timm's `forward_features` and `forward_head`.

    Example:
        >>> import timm, torch
        >>> from nas_kd import make_ensemble
        >>> students = [timm.create_model("test_resnet", num_classes=10) for _ in range(2)]
        >>> images = torch.zeros(4, 3, 32, 32)
        >>> make_ensemble(students, images)(images).shape
        torch.Size([4, 3, 10])
    """
    _check_students(students)
    channels, classes = 0, set()
    for student in students:
        with eval_mode(student), torch.no_grad():
            features, logits = features_and_logits(student, images)
        channels += features.shape[1]
        classes.add(logits.shape[1])
    if len(classes) != 1:
        raise TrainingError(f"students that learn together need the same classes, got {sorted(classes)} outputs")
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "online teacher"))
        return Ensemble(students, channels, classes.pop()).to(images.device)


def features_and_logits(student: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """A timm network's last feature map (N×C×H×W) and its logits (N×K), from one pass.

    Where that is no map of channels first, what its classifier reads takes its place, as N×C×1×1.
    """
    features: Tensor = student.forward_features(images)
    logits: Tensor = student.forward_head(features)
    if features.ndim == 4 and getattr(student, "output_fmt", "NCHW") == "NCHW":
        return features, logits
    return student.forward_head(features, pre_logits=True).flatten(1)[:, :, None, None], logits


def accuracies(ensemble: nn.Module, images: ImageSet) -> tuple[float, ...]:
    """The accuracies (fractions) of the students of an ensemble, and last of its teacher."""
    right = predict_logits(ensemble, images).argmax(dim=2) == images.labels.cpu()[:, None]
    return tuple(right.double().mean(dim=0).tolist())


def _check_students(students: Sequence[nn.Module]) -> None:
    if len(students) < 2:
        raise TrainingError(f"online distillation needs at least 2 peers, got {len(students)}")
    for student in students:
        if not (hasattr(student, "forward_features") and hasattr(student, "forward_head")):
            raise ModelError(
                f"{type(student).__name__} lacks timm's forward_features and forward_head: online distillation reads "
                "its last feature map there"
            )
    for one, two in itertools.combinations(students, 2):
        pairs = zip(one.parameters(), two.parameters(), strict=False)
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
            raise TrainingError(
                "two peers start from the same weights, so they have little to teach each other: draw each from a seed "
                "of its own"
            )
