from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nas_kd.analysis.stride_reduction import reduce_stride
from nas_kd.errors import ModelError
from nas_kd.networks.plan import plan_of


def made(name: str, reduction: int, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return reduce_stride(timm.create_model(name, num_classes=10).eval(), reduction, 3)


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("resnet18", 8),
        ("resnet18", 1),
        ("resnet50", 4),
        ("mobilenetv2_100", 8),
        ("mobilenetv3_small_100", 16),
        ("vgg11_bn", 8),
        ("tf_efficientnet_lite0", 8),
        ("regnety_004", 8),
        ("ghostnet_100", 8),
        ("convnext_atto", 8),
        ("densenet121", 8),
        ("lcnet_050", 16),
    ],
)
def test_the_last_features_are_smaller_by_just_that(name: str, reduction: int) -> None:
    with torch.device("meta"):
        reference = timm.create_model(name, num_classes=10).eval()
        network = reduce_stride(timm.create_model(name, num_classes=10).eval(), reduction, 3)
        image = torch.zeros(1, 3, 128, 128)
        features = network.forward_features(image)
        lost = 1 if name == "convnext_atto" else 0  # its patches are cut without padding
        assert features.shape[-2:] == (128 // reduction - lost,) * 2
        assert network(image).shape == (1, 10)
    own = {key: tensor.shape for key, tensor in network.state_dict().items()}
    assert own == {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert not any(edit.shapes or edit.conv for edit in plan_of(network).edits.values())


def test_mobilenet_for_small_images_costs_what_is_written() -> None:
    network = made("mobilenetv2_100", 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in network.parameters()) == 2_236_682
    assert counter.get_total_flops() // 2 == 87_976_448


def test_weights_stay_and_the_networks_own_stride_changes_nothing() -> None:
    torch.manual_seed(0)
    reference = timm.create_model("resnet18", num_classes=10).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(made("resnet18", 32)(image), reference(image))
        reduced = made("resnet18", 8)
        assert not torch.equal(reduced(image), reference(image))
    assert all(torch.equal(a, b) for a, b in zip(reduced.parameters(), reference.parameters(), strict=True))


def test_a_second_reduction_adds_to_the_first() -> None:
    once = made("resnet18", 8)
    twice = reduce_stride(made("resnet18", 16), 8, 3)
    image = torch.randn(1, 3, 64, 64)
    assert plan_of(twice).edits.keys() >= plan_of(once).edits.keys()
    with torch.no_grad():
        assert torch.equal(once(image), twice(image))


@pytest.mark.parametrize("reduction", [0, 7, 3, 64])
def test_a_reduction_that_does_not_divide_is_refused(reduction: int) -> None:
    with pytest.raises(ModelError, match=rf"--reduction {reduction} does not divide the total stride 32 of ResNet"):
        made("resnet18", reduction)
