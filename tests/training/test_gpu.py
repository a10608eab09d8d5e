"""The same loop on a GPU: one process, real memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nas_kd.training.augment import Augmentation
from nas_kd.training.data import Splits
from nas_kd.training.images import AugmentedImages
from nas_kd.training.loop import evaluate, train
from nas_kd.training.online import train_online
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import Teacher
from nas_kd.training.views import OnlineViews, ViewSpec, build_views

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("amp", [False, True])
def test_it_learns_from_cached_views(
    make_network: Callable[..., nn.Module], digits: Splits, tmp_path: Path, amp: bool
) -> None:
    teacher, student = make_network(1).cuda(), make_network(2).cuda()
    views = build_views(digits.train, teacher, ViewSpec(count=2, augmentation=Augmentation(flip=False)), tmp_path)
    recipe = Recipe(epochs=4, batch_size=16, lr=0.05, distill_weight=0.5, amp=amp, channels_last=True)
    result = train(student, views, recipe, val=digits.val)
    assert result.losses[-1] < result.losses[0]
    assert result.accuracy == pytest.approx(evaluate(student, digits.val))


def test_it_learns_from_an_online_teacher(make_network: Callable[..., nn.Module], digits: Splits) -> None:
    data = OnlineViews(AugmentedImages(digits.train, Augmentation()), Teacher(make_network(1).cuda()))
    result = train(make_network(2).cuda(), data, Recipe(epochs=3, batch_size=16))
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("amp", [False, True])
def test_peers_learn_together(make_network: Callable[..., nn.Module], digits: Splits, amp: bool) -> None:
    students = [make_network(seed).cuda() for seed in (1, 2, 3)]
    data = AugmentedImages(digits.train, Augmentation(flip=False))
    recipe = Recipe(epochs=4, batch_size=16, lr=0.05, amp=amp, channels_last=True)
    result = train_online(students, data, recipe, val=digits.val)
    assert result.training.losses[-1] < result.training.losses[0]
    assert max(result.accuracies[:-1]) == pytest.approx(evaluate(result.student, digits.val))
    assert all(parameter.is_cuda for parameter in result.ensemble.parameters())


def test_out_of_memory_halves_the_batch(
    make_network: Callable[..., nn.Module], digits: Splits, caplog: pytest.LogCaptureFixture
) -> None:
    class Hungry(nn.Module):
        """Asks for more than the device has when it sees more than 20 images."""

        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            torch.empty(torch.cuda.mem_get_info()[1] * (len(images) > 20), dtype=torch.uint8, device=images.device)
            logits: torch.Tensor = self.network(images)
            return logits

    data = AugmentedImages(digits.train, Augmentation())
    with caplog.at_level(logging.WARNING):
        train(Hungry(make_network()).cuda(), data, Recipe(epochs=1, batch_size=64, distill_weight=0))
    assert "go on as 4 pieces" in caplog.text
