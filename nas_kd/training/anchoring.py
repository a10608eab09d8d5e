"""Anchoring: batch norms get the statistics of the images at hand, and the network stays the function that it was."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas_kd.data.images import Images, normalise
from nas_kd.errors import DataError
from nas_kd.training.evaluation import (
    device_of,
    eval_mode,
    evaluate,
    is_below,
    memory_layout,
    recalibrate,
    suits_channels_last,
)
from nas_kd.training.small_maps import reached_taps

_logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Moments:
    """What the inputs of a norm add up to per channel, in float64: `count` values, their `mean`, and `squares`, the sum
    of their squared distances to it."""

    count: int
    mean: Tensor
    squares: Tensor

    @property
    def variance(self) -> Tensor:
        """The mean squared distance to the mean."""
        return self.squares / self.count


def anchor(network: nn.Module, images: Images, *, batch_size: int = 64) -> tuple[str, ...]:
    """Gives batch norms the statistics of your images, and leaves the network's outputs in eval mode what they were.

    Weights that were trained on other images, or at another size, have running statistics that do not fit: training
    mode, or `recalibrate`, replaces them, and so makes the network another function. After this they agree with it: γ
    and β change with the mean and variance. A norm that is used several times gets the statistics of all uses together.
    Left as they are: norms without running statistics or without γ and β, those that share them with another norm, and
    those that no image reaches. Modes and gradients stay.

    Args:
        network: Changed in place.
        images: They went through the training augmentation; 512 are enough.
        batch_size: Images at once.

    Returns:
        The paths of the norms that changed.

    Raises:
        DataError: For fewer than 2 images.

    Example:
        >>> import timm, torch
        >>> from nas_kd import Images, anchor
        >>> pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> images = Images(pixels, torch.arange(8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        >>> anchor(timm.create_model("test_resnet"), images)[0]
        'conv1.1'
    """
    moments, own = input_moments(network, images, batch_size=batch_size), dict(_anchorable(network))
    norms = [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    anchored = tuple(name for name in own if name in moments and _move(own[name], moments[name]))
    if left := [name for name in norms if name not in anchored]:
        _logger.info("%d of %d batch norms cannot be anchored, e.g. %s", len(left), len(norms), left[0])
    return anchored


def anchor_where_foreign(network: nn.Module, images: Images) -> bool:
    """Anchors a network of which nobody says where its weights come from, where recalibration on these labelled images
    would make it worse; says so in the log. Gives whether it did. Statistics that merely lag behind a short training
    are left to recalibration, which makes such a network better."""
    recalibrated = copy.deepcopy(network)
    recalibrate(recalibrated, images)
    before, after = (evaluate(candidate, images) for candidate in (network, recalibrated))
    foreign = is_below(after, before, len(images))
    if foreign:
        anchored = anchor(network, images)
        _logger.info("%d batch norms had the statistics of other images and were anchored to these", len(anchored))
    return foreign


def input_moments(network: nn.Module, images: Images, *, batch_size: int = 64) -> Mapping[str, Moments]:
    """What the batch norms of a network see of `images` in eval mode, by path; those that no image reaches are missing.

    Raises DataError for fewer than 2 images.
    """
    if len(images) < 2:
        raise DataError(f"batch norm needs at least 2 images, got {len(images)}")
    device, last = device_of(network), suits_channels_last(network)
    with _watched(network) as seen, eval_mode(network), reached_taps(network), torch.inference_mode():
        for pixels in torch.split(images.pixels, batch_size):
            network(memory_layout(normalise(pixels, images.mean, images.std, device), last))
    return seen


@contextmanager
def _watched(network: nn.Module) -> Iterator[dict[str, Moments]]:
    """Inside the block, what the batch norms of a network see is counted."""
    seen: dict[str, Moments] = {}
    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm)]

    def watch(name: str, norm: _BatchNorm) -> torch.utils.hooks.RemovableHandle:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = _merged(seen.get(name), _moments(inputs[0]))

        return norm.register_forward_pre_hook(see)

    handles = [watch(name, norm) for name, norm in norms]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _moments(inputs: Tensor) -> Moments:
    """Of N×C×… values."""
    # float32 sums of a map at a time, float64 beyond: half of the time of float64 throughout
    values = inputs.detach().float().flatten(2) if inputs.ndim > 2 else inputs.detach().float()[:, :, None]
    variance, mean = torch.var_mean(values, dim=2, correction=0)
    mean, variance = mean.double(), variance.double()
    centre = mean.mean(0)
    squares = values.shape[2] * (variance + (mean - centre).square()).sum(0)
    return Moments(len(values) * values.shape[2], centre, squares)


def _merged(one: Moments | None, other: Moments) -> Moments:
    """Of two samples together, as Chan, Golub and LeVeque have it: no difference of large squares."""
    if one is None:
        return other
    count, apart = one.count + other.count, other.mean - one.mean
    squares = one.squares + other.squares + apart.square() * (one.count * other.count / count)
    return Moments(count, one.mean + apart * (other.count / count), squares)


def _anchorable(network: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """The norms with statistics, γ and β of their own, by path."""
    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    holders = Counter(id(tensor) for _, norm in norms for tensor in _tensors(norm))
    for name, norm in norms:
        if len(_tensors(norm)) == 4 and all(holders[id(tensor)] == 1 for tensor in _tensors(norm)):
            yield name, norm


def _tensors(norm: _BatchNorm) -> list[Tensor]:
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [tensor for tensor in tensors if tensor is not None]


@torch.no_grad()
def _move(norm: _BatchNorm, moments: Moments) -> bool:
    """Gives a norm these statistics, γ and β changed to suit; not where a value would overflow."""
    mean, variance, gamma, beta = (
        tensor.double() for tensor in (moments.mean, moments.variance, norm.weight, norm.bias)
    )
    assert norm.running_mean is not None
    assert norm.running_var is not None
    own = (norm.running_var.double() + norm.eps).sqrt()
    # of a channel without variance γ shrinks with √eps, and what it multiplies is as much larger: nothing blows up
    new = (gamma * (variance + norm.eps).sqrt() / own, beta + gamma * (mean - norm.running_mean.double()) / own)
    if not all(tensor.to(norm.weight.dtype).isfinite().all() for tensor in (mean, variance, *new)):
        return False
    for tensor, value in zip(
        (norm.weight, norm.bias, norm.running_mean, norm.running_var), (*new, mean, variance), strict=True
    ):
        tensor.copy_(value)
    return True
