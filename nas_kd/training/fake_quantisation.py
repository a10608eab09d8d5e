"""Training that feels int8: weights and activations are rounded as an int8 file rounds them, gradients pass through.

Rounding a weight per output channel by its largest magnitude commutes with the scale of a batch norm behind it, so the
network keeps its norms, whose statistics are frozen, and is afterwards what it was, with other weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_WEIGHT, _ACTIVATION = 127, 255  # the largest int8 that weights use, and uint8
_SMALLEST = 1e-8  # a scale: channels that are nothing stay nothing


class _RoundedWeight(nn.Module):
    """A weight as int8 holds it: per output channel, symmetric."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().flatten(1).abs().amax(1).clamp_min(_SMALLEST) / _WEIGHT
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -_WEIGHT, _WEIGHT)


class _RoundedInput:
    """A pre-hook that rounds what a layer reads to the 256 steps of the range that it has had so far."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, *rest = arguments
        self.low = min(self.low, float(images.detach().amin()))
        self.high = max(self.high, float(images.detach().amax()))
        scale = max(self.high - self.low, _SMALLEST) / _ACTIVATION
        zero = max(0, min(_ACTIVATION, round(-self.low / scale)))
        return (torch.fake_quantize_per_tensor_affine(images, scale, zero, 0, _ACTIVATION), *rest)


class FrozenNorms(nn.Module):
    """A network whose batch norms stay in eval mode while it is trained: an int8 file has them folded into weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> FrozenNorms:
        """Sets the mode of all modules but the batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K for normalised images N×C×H×W."""
        logits: Tensor = self.network(images)
        return logits


@contextmanager
def fake_quantised(network: nn.Module) -> Iterator[FrozenNorms]:
    """Inside the block every convolution and linear layer of `network` rounds its weight and its input.

    Yields:
        What to train: the network with its norms frozen. Its own weights, not the rounded ones, are what is left.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(_RoundedInput()) for layer in layers]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _RoundedWeight())
    try:
        yield FrozenNorms(network)
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
