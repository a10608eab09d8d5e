"""One way to see the ATen operators that a network runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nas_kd.models.labels import tensors
from nas_kd.models.schedule import Activations


class OperatorHook(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `hook(operator, arguments, keywords, output)` after each ATen operator that runs inside."""

    def __init__(self, hook: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._hook = hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._hook(func, args, kwargs or {}, output)
        return output


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one forward pass makes: its outputs, the activations in between, and twice its MACs."""

    outputs: tuple[Tensor, ...]
    activations: Activations
    flops: int


def followed(network: nn.Module, image: Tensor) -> Run:
    """Run a network and follow its activations; flops are by torch's own formulas (`FlopCounterMode` adds up the same
    and also keeps a tree of modules)."""
    activations, flops = Activations(), 0
    activations.begin(image)

    def hook(operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        nonlocal flops
        formula = flop_registry.get(operator._overloadpacket)
        if formula is not None:
            flops += formula(*arguments, **keywords, out_val=output)
        activations.record("", tensors([*arguments, keywords]), tensors(output))

    with torch.no_grad(), OperatorHook(hook):
        outputs = tuple(tensors(network(image)))
    return Run(outputs=outputs, activations=activations, flops=flops)
