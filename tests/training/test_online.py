"""Online distillation on real digits and timm's own small test ResNet."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import nas_kd.models  # noqa: F401  registers the models
from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Batch
from nas_kd.data.splits import Splits
from nas_kd.errors import ModelError, TrainingError
from nas_kd.training.evaluation import evaluate
from nas_kd.training.loop import Run
from nas_kd.training.losses import ensemble_loss, soft_loss
from nas_kd.training.online import Ensemble, OnlineResult, accuracies, features_and_logits, make_ensemble, train_online
from nas_kd.training.recipe import Recipe

MakeNetwork = Callable[..., nn.Module]
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.02)


@pytest.fixture
def data(digits: Splits) -> AugmentedImages:
    return AugmentedImages(digits.train, Augmentation(flip=False))


@pytest.fixture
def together(make_network: MakeNetwork, data: AugmentedImages, digits: Splits) -> Callable[..., OnlineResult]:
    """Trains peers that start from the given seeds."""

    def run(recipe: Recipe = RECIPE, seeds: tuple[int, ...] = (1, 2), **more: Any) -> OnlineResult:
        return train_online([make_network(seed) for seed in seeds], data, recipe, val=digits.val, **more)

    return run


def weights(network: nn.Module) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in network.state_dict().values()])


def test_the_teacher_is_what_the_paper_says(make_network: MakeNetwork) -> None:
    """concatenate → batch norm → ReLU → global average pool → linear."""
    students = [make_network(seed).eval() for seed in (1, 2)]
    ensemble = Ensemble(students, 2 * students[0].num_features, 10).eval()
    head = ensemble.teacher
    with torch.no_grad():
        head.norm.running_mean.normal_()
        head.norm.running_var.uniform_(0.5, 2)
        images = torch.randn(3, 1, 64, 64)
        maps = torch.cat([student.forward_features(images) for student in students], dim=1)
        assert maps.shape[2:] == (2, 2)
        scaled = (maps - head.norm.running_mean[:, None, None]) / (head.norm.running_var[:, None, None] + 1e-5).sqrt()
        expected = scaled.clamp(min=0).mean(dim=(2, 3)) @ head.fc.weight.T + head.fc.bias
        outputs = ensemble(images)
    torch.testing.assert_close(outputs[:, 2], expected)
    for number, student in enumerate(students):
        torch.testing.assert_close(outputs[:, number], student(images))


def test_they_learn_and_the_best_by_validation_is_chosen(together: Callable[..., OnlineResult], digits: Splits) -> None:
    heard: list[float] = []
    result = together(
        Recipe(epochs=8, batch_size=16, lr=0.05, eval_epochs=(4,)), (1, 2, 3), report=lambda _, a: heard.append(a)
    )
    alone = tuple(evaluate(student, digits.val) for student in result.ensemble.students)
    assert result.accuracies[:-1] == pytest.approx(alone)
    assert evaluate(result.student, digits.val) == pytest.approx(max(alone))
    assert result.training.accuracy == pytest.approx(max(alone))
    assert [accuracy for _, accuracy in result.training.accuracies] == heard
    assert result.training.losses[-1] < 0.6 * result.training.losses[0]
    assert max(alone) > 0.3
    assert result.accuracies[-1] > 0.3  # the teacher
    assert not result.ensemble.training


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_of_peers_that_differ_for_certain_is_chosen(
    make_network: MakeNetwork, data: AugmentedImages, digits: Splits, best: int
) -> None:
    """Each always gives one class, whatever it sees, and every validation image is of the best one's."""
    students = [make_network(seed) for seed in (1, 2, 3)]
    for number, student in enumerate(students):
        with torch.no_grad():
            student.get_classifier().weight.zero_()
            student.get_classifier().bias.copy_(torch.eye(10)[number] * 10)
    val = digits.val[digits.val.labels == best]
    result = train_online(students, data, replace(RECIPE, epochs=1, lr=1e-6), val=val)
    assert result.accuracies[:-1] == tuple(float(number == best) for number in range(3))
    assert result.student is result.ensemble.students[best]
    assert result.training.accuracy == 1


def test_the_seed_decides_everything(together: Callable[..., OnlineResult]) -> None:
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(results))  # the caller's randomness does not matter
        results.append(together(replace(RECIPE, epochs=1, seed=seed)))
    first, second, third = (weights(result.ensemble) for result in results)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_killed_training_goes_on_to_the_same_weights(together: Callable[..., OnlineResult], tmp_path: Path) -> None:
    recipe, run = replace(RECIPE, epochs=3, eval_epochs=(1, 2), ema=0.9), Run(checkpoint=tmp_path / "state")
    expected = together(recipe)

    def kill(epoch: int, accuracy: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(recipe, report=kill, run=run)
    heard: list[int] = []
    result = together(recipe, report=lambda epoch, _: heard.append(epoch), run=run)
    assert heard == [3]
    assert torch.equal(weights(result.ensemble), weights(expected.ensemble))
    assert result.accuracies == expected.accuracies
    assert result.training.losses == expected.training.losses


def test_a_state_of_other_switches_is_not_resumed(
    together: Callable[..., OnlineResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, run = replace(RECIPE, epochs=1), Run(checkpoint=tmp_path / "state")
    together(recipe, run=run)
    with caplog.at_level(logging.WARNING):
        result = together(replace(recipe, teacher_gradient=True), run=run)
    assert "cannot resume from" in caplog.text
    fresh = together(replace(recipe, teacher_gradient=True))
    assert torch.equal(weights(result.ensemble), weights(fresh.ensemble))


@pytest.mark.parametrize("teacher_gradient", [False, True])
def test_the_soft_loss_moves_the_teacher_only_when_switched(make_network: MakeNetwork, teacher_gradient: bool) -> None:
    """The cross-entropy taken away, what is left is the soft loss: does it reach the teacher's own weights?"""
    ensemble = make_ensemble([make_network(1), make_network(2)], torch.randn(2, 1, 32, 32)).train()
    images, labels = torch.randn(8, 1, 32, 32), torch.arange(8)

    def gradient(temperature_loss: bool) -> Tensor:
        ensemble.zero_grad()
        kd = soft_loss("kd", temperature=4)
        soft = kd if temperature_loss else lambda student, teacher, labels: student.sum() * 0
        ensemble_loss(ensemble(images), labels, soft=soft, teacher_gradient=teacher_gradient).backward()
        assert ensemble.teacher.fc.weight.grad is not None
        return ensemble.teacher.fc.weight.grad.clone()

    assert torch.equal(gradient(True), gradient(False)) is not teacher_gradient


def test_the_teachers_own_loss_trains_the_students(make_network: MakeNetwork) -> None:
    """CE(z_t) reaches the students' convolutions through the concatenated maps, as in the authors' code."""
    ensemble = make_ensemble([make_network(1), make_network(2)], torch.randn(2, 1, 32, 32)).train()
    nn.functional.cross_entropy(ensemble(torch.randn(8, 1, 32, 32))[:, -1], torch.arange(8)).backward()
    for student in ensemble.students:
        assert next(student.parameters()).grad.abs().sum() > 0
        assert not student.get_classifier().weight.grad.any()


def test_the_soft_loss_is_the_recipes(together: Callable[..., OnlineResult]) -> None:
    recipe = replace(RECIPE, epochs=1)
    others = [{"distill": "dkd"}, {"class_mean": True}, {"temperature": 2.0}]
    losses = [together(recipe).training.losses[0]]
    losses += [together(replace(recipe, **other)).training.losses[0] for other in others]
    assert len(set(losses)) == 4
    assert losses[2] < losses[0] < losses[1]


def test_logits_of_a_finished_teacher_are_not_used(
    make_network: MakeNetwork, data: AugmentedImages, digits: Splits, together: Callable[..., OnlineResult]
) -> None:
    class Taught:
        """The same images with a teacher that is always sure of class 3."""

        mean, std, bytes = data.mean, data.std, data.bytes

        def __len__(self) -> int:
            return len(data)

        def to(self, device: torch.device) -> Taught:
            return self

        def batch(self, epoch: int, indices: Tensor) -> Batch:
            return replace(data.batch(epoch, indices), logits=torch.eye(10)[3].repeat(len(indices), 1) * 20)

        def batches(self, epoch: int, order: Sequence[Tensor]) -> Iterator[Batch]:
            return (self.batch(epoch, indices) for indices in order)

    recipe = replace(RECIPE, epochs=1)
    taught = train_online([make_network(1), make_network(2)], Taught(), recipe, val=digits.val)
    assert torch.equal(weights(taught.ensemble), weights(together(recipe).ensemble))


def test_amp_channels_last_and_adamw_train_too(together: Callable[..., OnlineResult]) -> None:
    recipe = replace(RECIPE, epochs=3, amp=True, channels_last=True, optimizer="adamw", lr=0.002, schedule="step")
    result = together(recipe)
    assert result.training.losses[-1] < result.training.losses[0]
    assert all(parameter.is_contiguous() for parameter in result.ensemble.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in result.ensemble.parameters())


class SmallMemory(nn.Module):
    """A student on a device whose memory holds only 10 images: it fails as CUDA does."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward_features(self, images: Tensor) -> Tensor:
        if len(images) > 10 and self.training:
            raise torch.OutOfMemoryError("out of memory")
        features: Tensor = self.network.forward_features(images)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        logits: Tensor = self.network.forward_head(features, pre_logits=pre_logits)
        return logits


def test_out_of_memory_halves_the_batch(
    make_network: MakeNetwork, data: AugmentedImages, digits: Splits, caplog: pytest.LogCaptureFixture
) -> None:
    students = [SmallMemory(make_network(seed)) for seed in (1, 2)]
    with caplog.at_level(logging.WARNING):
        train_online(students, data, replace(RECIPE, epochs=1), val=digits.val)
    assert "batches of 32 go on as 4 pieces" in caplog.text


def test_a_loss_that_is_not_finite_is_an_error(
    make_network: MakeNetwork, data: AugmentedImages, digits: Splits
) -> None:
    students = [make_network(1), make_network(2)]
    with torch.no_grad():
        next(students[1].parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss became nan in epoch 1 of 2"):
        train_online(students, data, RECIPE, val=digits.val)


def test_what_cannot_learn_together_is_refused(
    make_network: MakeNetwork, data: AugmentedImages, digits: Splits
) -> None:
    def run(*students: nn.Module) -> None:
        train_online(students, data, RECIPE, val=digits.val)

    with pytest.raises(TrainingError, match="needs at least 2 peers, got 1"):
        run(make_network(1))
    with pytest.raises(TrainingError, match="needs at least 2 peers, got 0"):
        run()
    with pytest.raises(TrainingError, match="start from the same weights, so they have little to teach"):
        run(make_network(1), make_network(2), make_network(1))
    with pytest.raises(TrainingError, match=r"need the same classes, got \[10, 12\] outputs"):
        run(make_network(1), make_network(2, classes=12))
    with pytest.raises(ModelError, match="Sequential lacks timm's forward_features and forward_head"):
        run(make_network(1), nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("cifar_resnet20_cheap", {"conv": "shift"}),
        ("cifar_resnet20_cheap", {"conv": "group4"}),
        ("cifar_vgg16_bn", {}),
        ("mobilenetv2_050", {}),
        ("mobilenetv3_small_050", {}),  # a convolution after the pooling
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 1}),  # channels last in its maps
    ],
)
def test_any_timm_network_can_take_part(name: str, given: dict[str, Any]) -> None:
    students = [timm.create_model(name, num_classes=10, **given) for _ in range(2)]
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    channels = sum(features_and_logits(student, images)[0].shape[1] for student in students)
    ensemble = Ensemble(students, channels, 10)
    ensemble_loss(ensemble(images), labels, soft=soft_loss("kd", temperature=4)).backward()
    assert all(parameter.grad is not None for parameter in ensemble.parameters())
    with torch.no_grad():
        outputs = ensemble.eval()(images)
        assert outputs.shape == (2, 3, 10)
        torch.testing.assert_close(outputs[:, 0], students[0](images))


def test_accuracies_are_those_of_the_students_alone(make_network: MakeNetwork, digits: Splits) -> None:
    students = [make_network(1), make_network(2)]
    ensemble = make_ensemble(students, torch.randn(2, 1, 32, 32))
    first, second, teacher = accuracies(ensemble, digits.val)
    assert (first, second) == pytest.approx(tuple(evaluate(student, digits.val) for student in students))
    assert 0 <= teacher <= 1
