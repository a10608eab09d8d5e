"""Zero-cost scores against hand-computed values on small networks, and on timm's own test networks."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn

from nas_kd.rank_check.zero_cost import ZERO_COST, gradient_norm, jacobian_covariance, snip, synflow

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


@pytest.fixture
def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4, bias=False))


def by_hand(network: nn.Sequential) -> tuple[Tensor, Tensor]:
    """The weight of a linear classifier and the gradient of its cross-entropy: (softmax − one-hot)ᵀ x / N."""
    weight: Tensor = network[1].weight.detach()  # type: ignore[assignment]
    flat = IMAGES.flatten(1)
    wrong = (flat @ weight.T).softmax(1) - nn.functional.one_hot(LABELS, 4)
    return weight, wrong.T @ flat / len(flat)


def test_gradient_norm_and_snip_of_a_linear_classifier(linear: nn.Sequential) -> None:
    weight, gradient = by_hand(linear)
    assert gradient_norm(linear, IMAGES, LABELS) == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert snip(linear, IMAGES, LABELS) == pytest.approx((weight * gradient).abs().sum().item(), rel=1e-5)


def test_synflow_is_conserved_by_every_layer() -> None:
    """Tanaka et al., theorem 1: each layer's scores sum to the output R."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 2, 1, bias=False),
        nn.Flatten(),
        nn.Linear(2 * 8 * 8, 4, bias=False),
    )
    flow = torch.ones(1, 3, 8, 8)
    for module in (network[0], network[3], network[5]):
        weight = module.weight.detach().abs()  # type: ignore[union-attr, operator]
        if isinstance(module, nn.Conv2d):
            flow = nn.functional.conv2d(flow, weight, padding=module.padding)  # type: ignore[arg-type]
        else:
            flow = flow.flatten(1) @ weight.T
    assert synflow(network, IMAGES, LABELS) == pytest.approx(3 * flow.sum().item(), rel=1e-5)


def test_synflow_knows_nothing_of_the_data(linear: nn.Sequential) -> None:
    assert synflow(linear, IMAGES, LABELS) == synflow(linear, 5 * IMAGES[:3], LABELS[:3])


def test_images_with_one_gradient_are_the_worst_for_jacob_cov(linear: nn.Sequential) -> None:
    """A linear network treats all images alike: one eigenvalue N, the others 0."""
    k, count = 1e-5, len(IMAGES)
    expected = -(math.log(count + k) + 1 / (count + k)) - (count - 1) * (math.log(k) + 1 / k)
    assert jacobian_covariance(linear, IMAGES, LABELS) == pytest.approx(expected, rel=1e-3)
    deep = timm.create_model("test_resnet", num_classes=4)
    assert jacobian_covariance(deep, torch.randn(8, 3, 32, 32), LABELS) > expected


def test_jacob_cov_is_undefined_without_gradients(linear: nn.Sequential) -> None:
    linear[1].weight.data.zero_()  # type: ignore[union-attr, operator]
    assert math.isnan(jacobian_covariance(linear, IMAGES, LABELS))


@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet", "test_mambaout"])
@pytest.mark.parametrize("name", ZERO_COST)
def test_a_real_network_gets_a_number_and_stays_as_it_was(model: str, name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=4)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    images = torch.randn(8, 3, 32, 32)
    score = ZERO_COST[name](network, images, LABELS)
    assert math.isfinite(score)
    assert ZERO_COST[name](network, images, LABELS) == pytest.approx(score, rel=1e-4)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
