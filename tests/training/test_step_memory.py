"""What a training step keeps in memory, and batches that go through it in pieces."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages
from nas_kd.data.memory import give_back
from nas_kd.data.splits import Splits
from nas_kd.training import step_memory
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
from nas_kd.training.step_memory import kept_bytes

RECIPE = Recipe(epochs=1, batch_size=80, lr=0.02, distill_weight=0)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(*layers).eval()


def test_what_a_step_keeps_is_counted_and_the_network_stays_as_it_was(network: nn.Module) -> None:
    before = copy.deepcopy(network.state_dict())
    images = torch.randn(5, 1, 8, 8)
    # the image, and what the convolution, the ReLU (the linear layer keeps the same memory) write, in floats
    least = 4 * (64 + 16 + 16)
    assert least <= kept_bytes(network, images) <= least + 4 * 8  # the norm's statistics, once for five images
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_larger_images_keep_more_by_their_area(network: nn.Module) -> None:
    network[4] = nn.AdaptiveAvgPool1d(10)
    small, large = (kept_bytes(network, torch.randn(2, 1, side, side)) for side in (32, 64))
    assert large == pytest.approx(4 * small, rel=0.1)


def test_a_batch_that_takes_too_much_goes_in_pieces_with_the_same_gradient(
    digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.Flatten(), nn.Linear(256, 10))
    pieced, sizes = copy.deepcopy(whole), list[int]()
    data = AugmentedImages(digits.train, Augmentation(flip=False))
    train(whole, data, RECIPE)
    monkeypatch.setattr(step_memory, "STEP_BYTES", 50 * int(kept_bytes(pieced, torch.zeros(2, 1, 32, 32))))
    pieced[0].register_forward_hook(lambda layer, images, output: sizes.append(len(output)))
    train(pieced, data, RECIPE)
    assert max(sizes) == 40
    for name, tensor in pieced.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name])


def test_bfloat16_keeps_half(digits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    network, sizes = nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, 10)), list[int]()
    monkeypatch.setattr(step_memory, "STEP_BYTES", 50 * int(kept_bytes(network, torch.zeros(2, 1, 32, 32))))
    network[0].register_forward_hook(lambda layer, images, output: sizes.append(len(output)))
    train(network, AugmentedImages(digits.train, Augmentation(flip=False)), replace(RECIPE, amp=True))
    assert max(sizes) == 80


def test_giving_memory_back_loses_nothing() -> None:
    kept = torch.arange(1000)
    give_back()
    assert kept.sum() == 499_500
