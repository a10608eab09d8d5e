"""Steps that compute once more what batch norms wrote: the same to the bit, and less is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.multiprocessing import reductions

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages
from nas_kd.data.splits import Splits
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
from nas_kd.training.recomputing import recomputing

weak_reference: Any = reductions.StorageWeakRef


class Awkward(nn.Module):
    """What is written in place, looked at from two sides, read twice, and not what a norm wrote any more."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(6))
        self.in_place, self.smooth, self.drop = nn.ReLU(inplace=True), nn.SiLU(), nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        conv, norm = self.convolutions, self.norms
        first = self.in_place(norm[0](conv[0](images)))
        second = norm[1](conv[1](first))
        second += first  # no longer what the norm wrote
        third = norm[2](self.smooth(norm[3](conv[2](second))))
        third.mul_(2.0)
        fourth = norm[4](conv[3](third))
        fourth = fourth.view_as(fourth).sigmoid_()  # the norm's memory, by another name
        fifth = norm[5](self.drop(fourth)).transpose(2, 3)
        made: Tensor = (conv[4](fifth) + fifth * self.smooth(fifth)).mean((2, 3))
        return made


def gradients(network: nn.Module, images: Tensor, *, again: bool) -> list[Tensor]:
    """Outputs, gradients and buffers after a step without an optimiser."""
    network = copy.deepcopy(network)
    torch.manual_seed(1)
    with recomputing(network) if again else nullcontext():
        outputs = network(images)
    torch.autograd.backward(outputs.square().mean())
    found = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [outputs.detach(), *found, *network.buffers()]


@pytest.mark.parametrize(
    "make",
    [
        Awkward,
        *(lambda name=name: timm.create_model(name, num_classes=10) for name in ("test_efficientnet", "test_resnet")),
        lambda: timm.create_model("test_efficientnet", act_layer="relu6", pad_type="same", drop_path_rate=0.5),
        lambda: timm.create_model("test_resnet", norm_layer="batchnorm").eval().requires_grad_(True),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_gradients_and_statistics_are_the_same(
    make: Callable[[], nn.Module], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    network, images = make(), torch.randn(4, 3, 32, 32)
    network.to(memory_format=layout)
    plain, again = (gradients(network, images.to(memory_format=layout), again=again) for again in (False, True))
    assert len(plain) == len(again) > 10
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize(("name", "sums"), [("test_efficientnet", 0), ("test_resnet", 4)])
def test_what_norms_and_activations_wrote_is_not_kept(name: str, sums: int) -> None:
    network, written = timm.create_model(name).train(), list[Any]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *seen: written.append(weak_reference(seen[2].untyped_storage())))
    kept = []
    for again in (False, True):
        written.clear()
        with recomputing(network) if again else nullcontext():
            outputs = network(torch.randn(2, 3, 32, 32))
        kept.append(sum(not storage.expired() for storage in written))
        torch.autograd.backward(outputs.sum())
    assert kept == [12, sums]  # what shortcuts were added to, in place, is kept


def test_a_training_of_large_steps_gives_the_same_weights(digits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    for largest in (1 << 30, 0):
        monkeypatch.setattr("nas_kd.training.loop.LARGE_STEP", largest)
        torch.manual_seed(0)
        network = timm.create_model("test_efficientnet", in_chans=1, num_classes=10)
        data = AugmentedImages(digits.train[:40], Augmentation(flip=False))
        train(network, data, Recipe(epochs=2, batch_size=20, distill_weight=0), val=digits.val)
        trained.append(network.state_dict())
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())
