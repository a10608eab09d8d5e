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


def run_on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`func(*args, **kwargs)` below autograd, for an ATen operator on tensors of the meta device.

    Short cuts for activations and for batch norms by their running statistics; all else is torch's own.
    """
    name = func._schema.name.removeprefix("aten::")
    first = args[0] if args else None
    if not (isinstance(first, Tensor) and first.is_meta and first.is_floating_point()) or "out" in kwargs:
        return func(*args, **kwargs)
    if name.endswith("_") and name[:-1] in _ALIKE:
        return first
    if name in _ALIKE:
        return torch.empty_like(first)
    if name == "native_batch_norm" and not kwargs and isinstance(args[3], Tensor) and not args[5]:
        computed = torch.promote_types(first.dtype, torch.float32)
        return torch.empty_like(first), *(torch.empty_like(args[3], dtype=computed) for _ in ("mean", "deviation"))
    return func(*args, **kwargs)
