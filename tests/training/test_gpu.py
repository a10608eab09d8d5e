"""The same loop on a GPU: one process, real memory."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks_on_gpu
import torch
from processes import end_of, start_ranks
from safetensors.torch import load_file
from shared_trainings import SPEC, far, network, trained
from torch import nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Batch
from nas_kd.data.splits import Splits, load_splits
from nas_kd.training import step_graph
from nas_kd.training.evaluation import evaluate, predict_logits
from nas_kd.training.loop import train
from nas_kd.training.online import train_online
from nas_kd.training.recipe import Recipe
from nas_kd.training.step_graph import EAGER, StepGraphs
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


def test_a_look_pads_its_images(make_network: Callable[..., nn.Module], digits: Splits) -> None:
    network = make_network().eval()
    expected = predict_logits(network, digits.val)
    found = [predict_logits(network.cuda(), digits.val, padded=padded) for padded in (False, True)]
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)


def batch_of(network: nn.Module, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(16, 1, 32, 32, generator=generator).to(next(network.parameters()).device)
    return Batch(pixels, torch.randint(0, 10, (16,), generator=generator).to(pixels.device), None)


def backward_of(network: nn.Module) -> Callable[[Batch], torch.Tensor]:
    def backward(batch: Batch) -> torch.Tensor:
        loss = nn.functional.cross_entropy(network(batch.pixels), batch.labels)
        torch.autograd.backward(loss)
        return loss.detach()

    return backward


def test_a_recorded_step_gives_the_gradients_of_the_step_itself(make_network: Callable[..., nn.Module]) -> None:
    network = make_network().cuda().train()
    graphs = StepGraphs(backward_of(network), network, torch.device("cuda"))
    for seed in range(EAGER + 2):
        graphs(batch_of(network, seed))
    loss = graphs(batch_of(network, 99))
    gradients = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    for parameter in network.parameters():
        parameter.grad = None
    expected = backward_of(network)(batch_of(network, 99))
    assert len(graphs.graphs) == 1
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    found = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    torch.testing.assert_close(gradients, found, rtol=1e-2, atol=1e-4)


def test_training_by_recorded_steps_gives_the_same_losses(
    make_network: Callable[..., nn.Module], digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = AugmentedImages(digits.train, Augmentation(flip=False))
    recipe = Recipe(epochs=2, batch_size=24, lr=0.002, distill_weight=0)  # so that roundings do not grow
    recorded = train(make_network(1).cuda(), data, recipe)
    monkeypatch.setattr(step_graph, "EAGER", 10**9)
    assert recorded.losses == pytest.approx(train(make_network(1).cuda(), data, recipe).losses, rel=0.02)


def test_a_network_that_waits_for_the_device_is_not_recorded_and_still_draws_at_random(
    make_network: Callable[..., nn.Module], digits: Splits
) -> None:
    class Waiting(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network
            self.dropout = nn.Dropout(0.1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.dropout(self.network(images))
            return logits if logits.sum().item() < 1e9 else 2 * logits

    data = AugmentedImages(digits.train, Augmentation(flip=False))
    recipe = Recipe(epochs=3, batch_size=16, lr=0.05, distill_weight=0)
    result = train(Waiting(make_network()).cuda(), data, recipe)
    assert result.losses[-1] < result.losses[0]
    assert torch.randn(3, device="cuda").isfinite().all()
    train(make_network().cuda(), data, recipe)  # and the next one may be recorded


@pytest.mark.parametrize("count", [1, 2])
def test_processes_share_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """One, by NCCL; two that share the device."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    load_splits(SPEC, tmp_path)
    made = tmp_path / "made.safetensors"
    started = start_ranks([sys.executable, ranks_on_gpu.__file__, str(tmp_path), str(made)], count)
    assert [end_of(process) for process in started] == [("", 0)] * count
    assert 0 <= far(trained(tmp_path, device="cuda").cpu(), load_file(made), network()) < 5e-3
