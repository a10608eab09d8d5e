"""Scores of untrained networks from the literature, to be compared with: each takes one batch and no training.

Compact versions of what Abdelfattah et al. compare in "Zero-cost proxies for lightweight NAS" (arXiv:2101.08134), for
networks of convolutions, linear layers and batch norms. A higher score predicts a better network in each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_JITTER = 1e-5  # k of arXiv:2006.04647v1, equation 2


def synflow(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Σ θ ∂R/∂θ with R the sum of the outputs for an image of ones and |θ| for θ: Tanaka et al. 2020
    (arXiv:2006.05467), equation 2. Batch norms are passed through as in arXiv:2101.08134; in float64, as the product
    over the layers overflows float32. `labels` do not matter, and of `images` N×C×H×W only the shape does."""
    twin = copy.deepcopy(network).double().eval()
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            _pass_through(module)
    for parameter in twin.parameters():
        parameter.data.abs_()
    outputs = twin(torch.ones_like(images[:1], dtype=torch.float64))
    weights = _weights(twin)
    gradients = torch.autograd.grad(outputs.sum(), weights, allow_unused=True)
    return _total(weights, gradients, lambda weight, gradient: (weight * gradient).sum())


def gradient_norm(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Σ over the layers of the Euclidean norm of the gradient of the cross-entropy (arXiv:2101.08134, section 3.1)."""
    weights, gradients = _gradients(network, images, labels)
    return _total(weights, gradients, lambda weight, gradient: gradient.norm())


def snip(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Σ |θ ∂L/∂θ| of the cross-entropy L: connection sensitivity of Lee et al. 2019 (arXiv:1810.02340), equation 4,
    summed over the network as in arXiv:2101.08134."""
    weights, gradients = _gradients(network, images, labels)
    return _total(weights, gradients, lambda weight, gradient: (weight * gradient).abs().sum())


def jacobian_covariance(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """−Σ (log(σᵢ + k) + 1/(σᵢ + k)), σ the eigenvalues of the correlations of the images' input gradients: Mellor et
    al. 2020 (arXiv:2006.04647v1), equation 2. NaN when a gradient does not vary."""
    twin = copy.deepcopy(network).train()
    inputs = images.detach().clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(twin(inputs).sum(), inputs)
    correlations = torch.corrcoef(jacobian.flatten(1).double().cpu())
    if not correlations.isfinite().all():
        return float("nan")
    shifted = torch.linalg.eigvalsh(correlations).clamp(min=0) + _JITTER
    return -float((shifted.log() + 1 / shifted).sum())


ZERO_COST: dict[str, Callable[[nn.Module, Tensor, Tensor], float]] = {
    "synflow": synflow,
    "gradient norm": gradient_norm,
    "SNIP": snip,
    "jacob_cov": jacobian_covariance,
}


def _gradients(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    twin = copy.deepcopy(network).train()  # batch statistics, and the running ones of the network stay as they are
    weights = _weights(twin)
    loss = F.cross_entropy(twin(images), labels)
    return weights, torch.autograd.grad(loss, weights, allow_unused=True)


def _weights(network: nn.Module) -> list[Tensor]:
    """The weights of convolutions and linear layers: what the papers score."""
    return [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.requires_grad]


def _total(
    weights: list[Tensor], gradients: tuple[Tensor | None, ...], score: Callable[[Tensor, Tensor], Tensor]
) -> float:
    pairs = zip(weights, gradients, strict=True)
    return float(sum(score(weight.detach(), gradient) for weight, gradient in pairs if gradient is not None))


@torch.no_grad()
def _pass_through(norm: _BatchNorm) -> None:
    """Makes a batch norm in eval mode the identity; its activation, where it has one of its own, stays."""
    norm.eps = 0.0
    for tensor, value in ((norm.running_mean, 0), (norm.running_var, 1), (norm.weight, 1), (norm.bias, 0)):
        if tensor is not None:
            tensor.fill_(value)
