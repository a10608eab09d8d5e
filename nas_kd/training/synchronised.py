"""Batch norms over the images of several processes, whatever the class of the layer and the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm
from torch.overrides import TorchFunctionMode

from nas_kd.errors import RankError


class NormsTogether(TorchFunctionMode):
    """Inside the block `F.batch_norm`, by which torch's and timm's layers are computed, sees the images of all
    processes of a group when it trains. torch's own SyncBatchNorm is a layer of its own, and for GPUs alone."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        call = inspect.signature(F.batch_norm).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        return self._batch_norm(**call.arguments) if call.arguments["training"] else F.batch_norm(**call.arguments)

    def _batch_norm(self, input: Tensor, *, weight: Tensor | None, bias: Tensor | None, **given: Any) -> Tensor:
        """The arguments are those of `F.batch_norm`."""
        momentum, eps = float(given["momentum"]), float(given["eps"])
        running: tuple[Tensor | None, Tensor | None] = given["running_mean"], given["running_var"]
        if input.is_cuda:
            apply: Callable[..., Tensor] = SyncBatchNorm.apply
            size = dist.get_world_size(self.group)
            return apply(input, weight, bias, *running, eps, momentum, self.group, size)
        centred, variance, mean, count = self._statistics(input.float())
        if running[0] is not None and running[1] is not None:
            with torch.no_grad():
                running[0].lerp_(mean, momentum)
                running[1].lerp_(variance * (count / (count - 1)), momentum)
        shape = (1, -1, *(1 for _ in input.shape[2:]))
        scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
        scaled = centred * scale.view(shape)
        return (scaled if bias is None else scaled + bias.view(shape)).type_as(input)

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of N×C×… values: themselves without their mean, and per channel the variance and the mean; how many there are
        of a channel, over all processes."""
        others = (0, *range(2, values.ndim))
        own = values.new_tensor([values.numel() / values.shape[1]])
        total = _add_up(torch.cat((values.sum(others), own)), self.group)
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = values - mean.view(1, -1, *(1 for _ in others[1:]))
        return centred, _add_up(centred.square().sum(others), self.group) / count, mean, count


class _AddUp(torch.autograd.Function):
    """The sum over all processes of a group; its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        return _sum(values, group)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum(gradients[0], context.group), None


def _add_up(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    apply: Callable[..., Tensor] = _AddUp.apply
    return apply(values, group)


def _sum(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    with reaching():
        dist.all_reduce(total, group=group)
    return total


@contextmanager
def reaching() -> Iterator[None]:
    """Raises RankError when another process of the group cannot be reached."""
    try:
        yield
    except RuntimeError as error:  # what torch raises for a closed connection has no class of its own
        if isinstance(error, RankError):
            raise
        raise RankError(
            "another process of this training has ended: what is finished is kept, the same command goes on from there"
        ) from error
