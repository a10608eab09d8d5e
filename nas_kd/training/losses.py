"""Distillation losses, each in its paper's notation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nas_kd.errors import TrainingError


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Soft-target loss T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over the batch.

    Both logits are N×K. T² keeps the gradient's scale independent of T: Hinton et al. 2015 (arXiv:1503.02531),
    section 2. Equal to the loss of timm's `LogitDistillationTask`. Raises TrainingError if the shapes differ or T ≤ 0.
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
    (equation 5). Raises TrainingError if the shapes differ or T ≤ 0.
    """
    _check(student_logits, teacher_logits, temperature)
    target = F.one_hot(labels, student_logits.shape[1]).bool()
    log_student, rest_student = _decouple(student_logits / temperature, target)
    log_teacher, rest_teacher = _decouple(teacher_logits / temperature, target)
    tckd = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    nckd = F.kl_div(rest_student, rest_teacher, reduction="batchmean", log_target=True)
    return (alpha * tckd + beta * nckd) * temperature**2


def student_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    *,
    distill_weight: float,
    temperature: float,
) -> Tensor:
    """(1 − distill_weight)·cross-entropy + distill_weight·`distillation_loss`, mean over the batch.

    Plain cross-entropy when there are no teacher logits or `distill_weight` is 0. Computed in float32.
    """
    logits = student_logits.float()
    if teacher_logits is None or distill_weight == 0:
        return F.cross_entropy(logits, labels)
    soft = distillation_loss(logits, teacher_logits.float(), temperature=temperature)
    if distill_weight == 1:
        return soft
    return (1 - distill_weight) * F.cross_entropy(logits, labels) + distill_weight * soft


def _decouple(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, rest), N×2, and of the other classes among themselves, N×(K−1)."""
    others = logits[~target].reshape(len(logits), -1)
    log_rest = torch.logsumexp(others, dim=1)
    binary = torch.stack((logits[target], log_rest), dim=1)
    return F.log_softmax(binary, dim=1), F.log_softmax(others, dim=1)


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise TrainingError(
            f"the student gives {tuple(student_logits.shape)} logits, the teacher {tuple(teacher_logits.shape)}: "
            "both need the same number of classes"
        )
    if temperature <= 0:
        raise TrainingError(f"temperature must be positive, got {temperature!r}")
