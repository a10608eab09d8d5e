"""What ATen operators give on the meta device, without the Python that torch runs to find out.

Torch writes most of its operators for the meta device as compositions of smaller ones: a batch norm takes two
milliseconds there, more than it takes to compute a small one. An analysis runs thousands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# pointwise operators of one tensor, whose output is like their input
_ALIKE = frozenset(
    "elu gelu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 sigmoid silu softplus tanh".split()
)
# pointwise operators of two: like the first where the second is a number, or as large and as precise at most
_OF_TWO = frozenset("aten::add.Tensor aten::div.Tensor aten::mul.Tensor aten::sub.Tensor".split())
_STATISTICS = ("mean", "deviation")


def run_on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`func(*args, **kwargs)` below autograd, for an ATen operator on tensors of the meta device.

    Short cuts for activations, sums, products and norms; all else is torch's own.
    """
    first = args[0] if args else None
    if not (isinstance(first, Tensor) and first.is_meta and first.is_floating_point()) or "out" in kwargs:
        return func(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    if name.endswith("_") and name[:-1] in _ALIKE:
        return first
    if name in _ALIKE or (func.name() in _OF_TWO and _is_like_the_first(first, args[1])):
        return _like(first)
    computed = torch.promote_types(first.dtype, torch.float32)
    if name == "native_batch_norm" and first.is_contiguous():
        return _like(first), *(torch.empty(first.shape[1], device="meta", dtype=computed) for _ in _STATISTICS)
    if name == "native_layer_norm" and first.dtype == computed:
        shape = (*first.shape[: first.ndim - len(args[1])], *(1 for _ in args[1]))
        outputs = (first.shape, shape, shape)
        return tuple(torch.empty(each, device="meta", dtype=computed) for each in outputs)
    return func(*args, **kwargs)


def _is_like_the_first(first: Tensor, second: Any) -> bool:
    """Whether a pointwise operator of the two gives a tensor like the first."""
    if not isinstance(second, Tensor):
        return isinstance(second, int | float)
    alike = first.dtype == second.dtype and first.is_contiguous() and second.is_contiguous()
    sides = zip(reversed(first.shape), reversed(second.shape), strict=False)
    return alike and first.ndim >= second.ndim and all(theirs in (1, ours) for ours, theirs in sides)


def _like(tensor: Tensor) -> Tensor:
    """`torch.empty_like` on the meta device, where that is Python."""
    if not tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), device="meta", dtype=tensor.dtype)
