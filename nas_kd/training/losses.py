"""Distillation losses, each in its paper's notation, and how they are put together.

A *soft loss* draws a student to a teacher: `soft(student, teacher, labels)` → mean over the batch, for logits N×K and
labels N; `soft_loss` makes one by name. A *criterion* is what training descends: `criterion(outputs, labels, teacher)`
for whatever the network gives. `student_loss` is that of a student beside a finished teacher, `ensemble_loss` that of
students that build their teacher online; both take any soft loss. Where images are mixed or labels smoothed, labels are
the classes' shares N×K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nas_kd.errors import TrainingError, nearest

SoftLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
SOFT_LOSSES = ("kd", "dkd")


def soft_loss(
    kind: str, *, temperature: float, alpha: float = 1.0, beta: float = 8.0, class_mean: bool = False
) -> SoftLoss:
    """The soft loss of this name.

    Args:
        kind: `kd`, which is `distillation_loss`, or `dkd`, `decoupled_distillation_loss`.
        temperature: T.
        alpha: Of `dkd`: the weight of the target class.
        beta: Of `dkd`: the weight of the other classes.
        class_mean: Whether to divide by the number of classes, as torch's default reduction does (the authors' code of
            arXiv 1909.13063).

    Returns:
        A function of student and teacher logits (N×K each) and labels (N) → a scalar.

    Raises:
        TrainingError: For an unknown name.

    Example:
        >>> import torch
        >>> from nas_kd import soft_loss
        >>> logits = torch.zeros(2, 10)
        >>> soft_loss("dkd", temperature=4.0)(logits, logits, torch.arange(2)).item()
        0.0
    """
    if kind == "kd":
        soft: SoftLoss = functools.partial(_ignore_labels, temperature=temperature)
    elif kind == "dkd":
        soft = functools.partial(decoupled_distillation_loss, temperature=temperature, alpha=alpha, beta=beta)
    else:
        raise TrainingError(f"unknown loss {kind!r}: use {' or '.join(SOFT_LOSSES)}{nearest(kind, SOFT_LOSSES)}")
    return functools.partial(_per_class, soft) if class_mean else soft


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Soft-target loss T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over the batch.

    T² keeps the gradient's scale independent of T: Hinton et al. 2015 (arXiv:1503.02531), section 2. Equal to the loss
    of timm's `LogitDistillationTask`.

    Args:
        student_logits: N×K.
        teacher_logits: N×K.
        temperature: T.

    Returns:
        A scalar.

    Raises:
        TrainingError: If the shapes differ, or T ≤ 0.

    Example:
        >>> import torch
        >>> from nas_kd import distillation_loss
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> round(distillation_loss(student, teacher, temperature=4.0).item(), 3)
        1.775
    """
    _check(student_logits, teacher_logits, temperature)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def decoupled_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """DKD = α·TCKD + β·NCKD (Zhao et al. 2022, arXiv:2203.08679, equation 7), scaled by T², mean over the batch.

    TCKD is the KL of the binary (target, rest) probabilities, NCKD the KL among the other classes. Logits are N×K,
    labels N. With α = 1 and β = the teacher's probability of the rest it is `distillation_loss` for one image
    (equation 5). Raises TrainingError if the shapes differ, T ≤ 0, or the labels are shares of several classes.
    """
    _check(student_logits, teacher_logits, temperature)
    if labels.ndim != 1:
        raise TrainingError("decoupled KD needs one class per image, these are mixed or smoothed: use kd instead")
    log_student, rest_student = _decouple(student_logits / temperature, labels)
    log_teacher, rest_teacher = _decouple(teacher_logits / temperature, labels)
    tckd = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    nckd = F.kl_div(rest_student, rest_teacher, reduction="batchmean", log_target=True)
    return (alpha * tckd + beta * nckd) * temperature**2


def student_loss(
    student_logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, *, distill_weight: float, soft: SoftLoss
) -> Tensor:
    """(1 − distill_weight)·cross-entropy + distill_weight·soft loss, mean over the batch: a criterion.

    Plain cross-entropy when there are no teacher logits or `distill_weight` is 0. Computed in float32. The DKD paper's
    own sum, cross-entropy + DKD, is twice this one at `distill_weight` 0.5.
    """
    logits = student_logits.float()
    if teacher_logits is None or distill_weight == 0:
        return F.cross_entropy(logits, labels)
    drawn = soft(logits, teacher_logits.float(), labels)
    if distill_weight == 1:
        return drawn
    return (1 - distill_weight) * F.cross_entropy(logits, labels) + distill_weight * drawn


def ensemble_loss(
    outputs: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    soft: SoftLoss,
    teacher_gradient: bool = False,
) -> Tensor:
    """L = CE(z_t) + Σ_i [CE(z_i) + soft(z_i, z_t)], every weight 1: the objective of arXiv 1909.13063, a criterion.

    Computed in float32.

    Args:
        outputs: N×(m+1)×K: the logits z_1 … z_m of m students, and last z_t of the teacher built from them
            (`make_ensemble`).
        labels: N int64.
        teacher_logits: Those of a finished teacher; not used.
        soft: The soft loss; T²·KL at T = 4 is the paper's (`soft_loss`).
        teacher_gradient: Whether the soft loss moves the teacher too, as in the authors' code; else the student alone.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> from nas_kd import ensemble_loss, soft_loss
        >>> outputs, labels = torch.zeros(4, 3, 10), torch.arange(4)  # two students, a teacher, ten classes
        >>> loss = ensemble_loss(outputs, labels, soft=soft_loss("kd", temperature=4.0))
        >>> round(loss.item(), 3)  # three cross entropies of log(10), no disagreement
        6.908
    """
    *students, teacher = outputs.float().unbind(dim=1)
    target = teacher if teacher_gradient else teacher.detach()
    loss = F.cross_entropy(teacher, labels)
    for logits in students:
        loss = loss + F.cross_entropy(logits, labels) + soft(logits, target, labels)
    return loss


def _ignore_labels(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    return distillation_loss(student_logits, teacher_logits, temperature=temperature)


def _per_class(soft: SoftLoss, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    return soft(student_logits, teacher_logits, labels) / student_logits.shape[1]


def _decouple(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, rest), N×2, and of the other classes among themselves, N×(K−1)."""
    target = labels[:, None]
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    # gathered by number: a mask would make a GPU wait to learn how many there are
    rest = logits.gather(1, others + (others >= target))
    binary = torch.cat((logits.gather(1, target), torch.logsumexp(rest, dim=1, keepdim=True)), dim=1)
    return F.log_softmax(binary, dim=1), F.log_softmax(rest, dim=1)


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise TrainingError(
            f"the student gives {tuple(student_logits.shape)} logits, the teacher {tuple(teacher_logits.shape)}: "
            "both need the same number of classes"
        )
    if temperature <= 0:
        raise TrainingError(f"temperature must be positive, got {temperature!r}")
