from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.task import LogitDistillationTask
from torch import Tensor, nn

from nas_kd.errors import TrainingError
from nas_kd.training.losses import decoupled_distillation_loss, distillation_loss, student_loss


def logits(seed: int, count: int = 6, classes: int = 10, scale: float = 3.0) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)) * scale


def test_hand_computed_value() -> None:
    # T = 2: teacher softmax(ln 4 / 2, 0) = (2/3, 1/3), student (1/2, 1/2); KL = 2/3 ln 4/3 + 1/3 ln 2/3, times T² = 4
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(4), 0.0]])
    expected = 4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    assert distillation_loss(student, teacher, temperature=2).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("distill_weight", [0.25, 1.0])
def test_it_agrees_with_timm(temperature: float, distill_weight: float) -> None:
    student, teacher = (timm.create_model("test_resnet", num_classes=10).eval() for _ in range(2))
    task = LogitDistillationTask(
        student,
        teacher,
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=1 - distill_weight,
        temperature=temperature,
        device=torch.device("cpu"),
        verbose=False,
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 9, 9])
    theirs = task(images, labels)
    ours = student_loss(
        student(images), labels, teacher(images), distill_weight=distill_weight, temperature=temperature
    )
    torch.testing.assert_close(ours, theirs["loss"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 8), offset=st.floats(-5, 5))
def test_zero_only_when_logits_agree_up_to_a_constant(seed: int, temperature: float, offset: float) -> None:
    teacher = logits(seed)
    assert distillation_loss(teacher + offset, teacher, temperature=temperature).item() == pytest.approx(0, abs=1e-4)
    assert distillation_loss(logits(seed + 1), teacher, temperature=temperature).item() > 1e-3


def test_float16_teacher_logits_are_harmless() -> None:
    student, teacher = logits(0, 500, 100), logits(1, 500, 100, scale=8)
    exact = distillation_loss(student, teacher, temperature=4)
    assert distillation_loss(student, teacher.half().float(), temperature=4).item() == pytest.approx(
        exact.item(), rel=1e-3
    )


def test_decoupled_loss_adds_up_to_the_coupled_one() -> None:
    # equation 5 of the paper: KD = TCKD + (1 - p_target) NCKD, image by image
    temperature, labels = 3.0, torch.tensor([4])
    student, teacher = logits(0, 1), logits(1, 1)
    rest = 1 - torch.softmax(teacher / temperature, dim=1)[0, 4].item()
    decoupled = decoupled_distillation_loss(student, teacher, labels, temperature=temperature, alpha=1, beta=rest)
    torch.testing.assert_close(decoupled, distillation_loss(student, teacher, temperature=temperature))


def test_decoupled_loss_ignores_the_target_when_alpha_is_zero() -> None:
    labels = torch.tensor([0, 1, 2])
    student, teacher = logits(0, 3), logits(1, 3)
    confident = student.clone()
    confident[torch.arange(3), labels] += 5
    losses = [
        decoupled_distillation_loss(given, teacher, labels, temperature=2, alpha=0, beta=1)
        for given in (student, confident)
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_without_a_teacher_it_is_cross_entropy() -> None:
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    expected = nn.functional.cross_entropy(logits(0), labels)
    torch.testing.assert_close(student_loss(logits(0), labels, None, distill_weight=0.9, temperature=4), expected)
    torch.testing.assert_close(student_loss(logits(0), labels, logits(1), distill_weight=0, temperature=4), expected)


def test_it_is_computed_in_float32() -> None:
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    loss = student_loss(logits(0).bfloat16(), labels, logits(1).half(), distill_weight=0.5, temperature=4)
    assert loss.dtype == torch.float32


def test_bad_input_is_refused() -> None:
    with pytest.raises(TrainingError, match="both need the same number of classes"):
        distillation_loss(logits(0, classes=10), logits(0, classes=9), temperature=1)
    with pytest.raises(TrainingError, match="temperature must be positive, got 0"):
        distillation_loss(logits(0), logits(1), temperature=0)
