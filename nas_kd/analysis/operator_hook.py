"""One way to see the ATen operators that a network runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nas_kd.analysis.labels import tensors
from nas_kd.analysis.schedule import Activations
from nas_kd.analysis.shapes import run_on_meta
from nas_kd.networks.convolutions import Shift2d


class OperatorHook(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `hook(operator, arguments, keywords, output)` after each ATen operator that runs inside."""

    def __init__(self, hook: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._hook = hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = run_on_meta(func, args, kwargs or {})
        self._hook(func, args, kwargs or {}, output)
        return output


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """What one forward pass makes: its outputs, the activations in between, and twice its MACs."""

    outputs: tuple[Tensor, ...]
    activations: Activations
    flops: int


def followed(network: nn.Module, image: Tensor) -> ForwardPass:
    """Run a network and follow its activations; flops are by torch's own formulas (`FlopCounterMode` adds up the same
    and also keeps a tree of modules). Shifts, which multiply by one and zero alone, have none."""
    activations, flops, running = Activations(), 0, [""]
    activations.begin(image)
    shifts = {name for name, module in network.named_modules() if isinstance(module, Shift2d)}

    def hook(operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        nonlocal flops
        formula = flop_registry.get(operator._overloadpacket)
        if formula is not None and running[-1] not in shifts:
            flops += formula(*arguments, **keywords, out_val=output)
        activations.record(running[-1], operator, arguments, tensors([*arguments, keywords]), tensors(output))

    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: _dropped_last(running)))
    try:
        with torch.no_grad(), OperatorHook(hook):
            outputs = tuple(tensors(network(image)))
    finally:
        for handle in handles:
            handle.remove()
    return ForwardPass(outputs=outputs, activations=activations, flops=flops)


def _dropped_last(names: list[str]) -> None:
    names.pop()
