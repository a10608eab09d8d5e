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
from nas_kd.training.losses import (
    decoupled_distillation_loss,
    distillation_loss,
    ensemble_loss,
    soft_loss,
    student_loss,
)

KD = soft_loss("kd", temperature=4)


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
    soft = soft_loss("kd", temperature=temperature)
    ours = student_loss(student(images), labels, teacher(images), distill_weight=distill_weight, soft=soft)
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
    torch.testing.assert_close(student_loss(logits(0), labels, None, distill_weight=0.9, soft=KD), expected)
    torch.testing.assert_close(student_loss(logits(0), labels, logits(1), distill_weight=0, soft=KD), expected)


def test_it_is_computed_in_float32() -> None:
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    loss = student_loss(logits(0).bfloat16(), labels, logits(1).half(), distill_weight=0.5, soft=KD)
    assert loss.dtype == torch.float32


def test_bad_input_is_refused() -> None:
    with pytest.raises(TrainingError, match="both need the same number of classes"):
        distillation_loss(logits(0, classes=10), logits(0, classes=9), temperature=1)
    with pytest.raises(TrainingError, match="temperature must be positive, got 0"):
        distillation_loss(logits(0), logits(1), temperature=0)


def test_decoupled_hand_computed_value() -> None:
    # T = 1, target 0. Teacher (4, 2, 2)/8: target 1/2; rest among itself (1/2, 1/2).
    # Student (1, 1, 2)/4: target 1/4, rest 3/4; rest among itself (1/3, 2/3).
    teacher = torch.log(torch.tensor([[4.0, 2.0, 2.0]]))
    student = torch.log(torch.tensor([[1.0, 1.0, 2.0]]))
    tckd = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    nckd = 0.5 * math.log(0.5 / (1 / 3)) + 0.5 * math.log(0.5 / (2 / 3))
    label = torch.tensor([0])
    loss = decoupled_distillation_loss(student, teacher, label, temperature=1, alpha=3, beta=5)
    assert loss.item() == pytest.approx(3 * tckd + 5 * nckd, rel=1e-5)
    by_name = soft_loss("dkd", temperature=1, alpha=3, beta=5)(student, teacher, label)
    assert by_name.item() == pytest.approx(3 * tckd + 5 * nckd, rel=1e-5)


def test_every_class_may_be_the_target() -> None:
    student, teacher = logits(0, 10), logits(1, 10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    inverse = order.argsort()
    for target in range(10):
        label = torch.full((10,), target)
        moved = decoupled_distillation_loss(student[:, order], teacher[:, order], inverse[label], temperature=2)
        torch.testing.assert_close(moved, decoupled_distillation_loss(student, teacher, label, temperature=2))


def ensemble_by_hand(temperature: float) -> tuple[Tensor, Tensor, float]:
    """One image of two classes, two students and their teacher: outputs, label, and the loss from the definition."""
    z1, z2, zt = (math.log(3), 0.0), (0.0, 0.0), (math.log(9), 0.0)  # odds 3:1, 1:1, 9:1 for class 0, which is right

    def softmax(z: tuple[float, float]) -> tuple[float, float]:
        exps = [math.exp(value / temperature) for value in z]
        return exps[0] / sum(exps), exps[1] / sum(exps)

    expected = -math.log(9 / 10)
    for z, right in ((z1, 3 / 4), (z2, 1 / 2)):
        kl = sum(t * math.log(t / s) for t, s in zip(softmax(zt), softmax(z), strict=True))
        expected += -math.log(right) + temperature**2 * kl
    return torch.tensor([[z1, z2, zt]], requires_grad=True), torch.tensor([0]), expected


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_ensemble_hand_computed_value(temperature: float) -> None:
    outputs, label, expected = ensemble_by_hand(temperature)
    loss = ensemble_loss(outputs, label, soft=soft_loss("kd", temperature=temperature))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_mean_over_classes_divides_the_soft_part_alone() -> None:
    # the authors' code: F.kl_div with its default reduction
    outputs, label, batchmean = ensemble_by_hand(4)
    hard = sum(nn.functional.cross_entropy(outputs[:, index], label).item() for index in range(3))
    loss = ensemble_loss(outputs, label, soft=soft_loss("kd", temperature=4, class_mean=True))
    assert loss.item() == pytest.approx(hard + (batchmean - hard) / 2, rel=1e-5)
    student, teacher = logits(0), logits(1)
    theirs = nn.functional.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="none").mean() * 16
    ours = soft_loss("kd", temperature=4, class_mean=True)(student, teacher, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("teacher_gradient", [False, True])
@pytest.mark.parametrize("kind", ["kd", "dkd"])
def test_the_switch_cuts_the_teachers_gradient(kind: str, teacher_gradient: bool) -> None:
    outputs = torch.stack([logits(seed) for seed in range(4)], dim=1).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    soft = soft_loss(kind, temperature=4)
    ensemble_loss(outputs, labels, soft=soft, teacher_gradient=teacher_gradient).backward()
    alone = logits(3).requires_grad_()
    nn.functional.cross_entropy(alone, labels).backward()
    assert outputs.grad is not None
    assert torch.allclose(outputs.grad[:, 3], alone.grad, atol=1e-6) is not teacher_gradient
    assert (outputs.grad[:, :3].abs().amax(dim=(0, 2)) > 1e-3).all()


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"unknown loss 'dkt': use kd or dkd; did you mean 'dkd'\?"):
        soft_loss("dkt", temperature=4)
