from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Images, normalise
from nas_kd.data.splits import Splits
from nas_kd.errors import DataError
from nas_kd.training.anchoring import anchor, anchor_where_foreign, input_moments
from nas_kd.training.evaluation import evaluate, predict_logits, recalibrate
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe


def make_foreign(network: nn.Module, seed: int = 0) -> nn.Module:
    """Gives the norms statistics that are not those of any images, and γ and β of all signs."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor, std=0.5)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.2, 3.0)
    return network


@pytest.fixture(scope="module")
def images(digits: Splits) -> Images:
    return digits.train[:48]


def rgb(images: Images) -> Images:
    return replace(images, pixels=images.pixels.expand(-1, 3, -1, -1), mean=images.mean * 3, std=images.std * 3)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "test_nfnet"])
def test_the_outputs_stay_and_the_statistics_become_those_of_the_images(name: str, images: Images) -> None:
    network, seen = make_foreign(timm.create_model(name, num_classes=10)), rgb(images)
    before = predict_logits(network, seen)
    recalibrated = copy.deepcopy(network)
    anchored = anchor(network, seen)
    norms = [path for path, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert list(anchored) == norms
    torch.testing.assert_close(predict_logits(network, seen), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    for path, moments in input_moments(network, seen).items():
        norm = network.get_submodule(path)
        assert isinstance(norm, nn.BatchNorm2d)
        torch.testing.assert_close(norm.running_mean, moments.mean.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(norm.running_var, moments.variance.float(), rtol=1e-2, atol=1e-5)
    if norms:  # what it is for: recalibration leaves the one as it was and makes another function of the other
        recalibrate(network, seen)
        recalibrate(recalibrated, seen)
        kept, lost = (predict_logits(model, seen) - before for model in (network, recalibrated))
        assert kept.std() < 0.05 * before.std() < lost.std()


def test_in_double_precision_the_outputs_stay_to_the_last_digits(images: Images) -> None:
    network = make_foreign(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 5))
    )
    network.eval().double()
    pixels = normalise(images.pixels, images.mean, images.std, torch.device("cpu")).double()
    before = network(pixels).detach()
    single = copy.deepcopy(network).float()
    anchor(single, images)
    assert isinstance(network[1], nn.BatchNorm2d)
    mean, variance = (tensor.double() for tensor in (single[1].running_mean, single[1].running_var))
    assert not torch.allclose(mean, network[1].running_mean, atol=1e-2)
    gain = (variance + network[1].eps).sqrt() / (network[1].running_var + network[1].eps).sqrt()
    torch.testing.assert_close(single[1].weight.double(), network[1].weight * gain, rtol=1e-5, atol=1e-6)
    anchor(_Doubled(network), images)
    torch.testing.assert_close(network(pixels), before, rtol=1e-10, atol=1e-10)


class _Doubled(nn.Module):
    """A network in double precision behind single-precision images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.double())


class _Shared(nn.Module):
    """A norm that is used twice, one that is never used, two that share γ, one without γ, one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.twice, self.never = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.one, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.other.weight = self.one.weight
        self.plain, self.momentary = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, images: Tensor) -> Tensor:
        first = self.stem(images)
        x = self.plain(self.other(self.one(self.twice(self.twice(first) * 2 + 1))))
        return self.momentary(x).mean((2, 3)) + x.amax((2, 3))


def test_norms_that_cannot_be_anchored_are_left_alone(images: Images, caplog: pytest.LogCaptureFixture) -> None:
    network = make_foreign(_Shared())
    before, state = predict_logits(network, images), copy.deepcopy(network.state_dict())
    with caplog.at_level(logging.INFO):
        assert anchor(network, images) == ("twice",)
    assert "5 of 6 batch norms cannot be anchored, e.g. never" in caplog.text
    torch.testing.assert_close(predict_logits(network, images), before, rtol=1e-4, atol=1e-4)
    changed = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, state[key])}
    assert changed == {f"twice.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    moments = input_moments(network, images)["twice"]
    assert moments.count == 2 * len(images) * 30 * 30


def test_a_channel_without_variance_stays_what_it_was(images: Images) -> None:
    """Also one whose stored variance is 0 and that lives on these images, and a γ of 0."""
    network = make_foreign(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AvgPool2d(30), nn.Flatten()))
    convolution, norm = network[0], network[1]
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        convolution.weight[0] = 0
        norm.running_var[1] = 0
        norm.weight[2] = 0
    before = predict_logits(network, images)
    assert anchor(network, images) == ("1",)
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    torch.testing.assert_close(predict_logits(network, images), before, rtol=1e-4, atol=1e-4)
    recalibrate(network, images)
    torch.testing.assert_close(predict_logits(network, images), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "wrap", [nn.SyncBatchNorm.convert_sync_batchnorm, nn.DataParallel, lambda network: network.requires_grad_(False)]
)
def test_wrapped_and_frozen_networks(wrap: Callable[[nn.Module], nn.Module], images: Images) -> None:
    network = wrap(make_foreign(timm.create_model("test_resnet", in_chans=1))).train()
    gradients = [parameter.requires_grad for parameter in network.parameters()]
    before = predict_logits(network, images)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    assert len(anchor(network, images)) == norms > 10
    assert network.training
    assert [parameter.requires_grad for parameter in network.parameters()] == gradients
    torch.testing.assert_close(predict_logits(network, images), before, rtol=1e-3, atol=1e-3)


def test_one_image_is_too_few(network: nn.Module, images: Images) -> None:
    with pytest.raises(DataError, match="at least 2 images, got 1"):
        anchor(network, images[:1])


def test_real_weights_survive_recalibration_once_they_are_anchored(lite0: nn.Module, textures: Splits) -> None:
    """ImageNet's statistics are those of larger images: to replace them is to lose the network."""
    images = replace(textures.train, labels=predict_logits(lite0, textures.train).argmax(1))
    recalibrated = copy.deepcopy(lite0)
    recalibrate(recalibrated, images)
    assert anchor_where_foreign(lite0, images)
    assert evaluate(lite0, images) == 1
    assert not anchor_where_foreign(lite0, images)  # it is at home now
    recalibrate(lite0, images)
    assert evaluate(lite0, images) > 0.9 > evaluate(recalibrated, images) + 0.2


def test_statistics_that_lag_behind_are_left_to_recalibration(network: nn.Module, digits: Splits) -> None:
    train(network, AugmentedImages(digits.train, Augmentation(flip=False)), Recipe(epochs=4, lr=0.03, distill_weight=0))
    before = copy.deepcopy(network.state_dict())
    assert not anchor_where_foreign(network, digits.train)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
