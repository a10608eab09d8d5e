"""What only training needs, folded away: branches of re-parameterised networks (RepVGG, MobileOne, FastViT, RepGhost),
and batch norms."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold(network: nn.Module) -> None:
    """Folds in place what only training needs; a block that cannot be folded any more stays."""
    for name, child in network.named_children():
        setattr(network, name, folded(child))
        fold(network.get_submodule(name))


def folded(module: Any) -> nn.Module:
    """The inference form of one module, or the module itself where it has none."""
    methods = ("fuse", "reparameterize", "switch_to_deploy")  # by which a module folds itself
    if not any(hasattr(module, method) for method in methods):
        return module  # type: ignore[no-any-return]
    draft: Any = copy.deepcopy(module)  # a module may fail when it is half done
    try:
        if hasattr(draft, "fuse"):
            return draft.fuse()  # type: ignore[no-any-return]
        for method in methods[1:]:
            if hasattr(draft, method):
                count_groups(draft)
                getattr(draft, method)()
                return draft  # type: ignore[no-any-return]
    except (ArithmeticError, AttributeError, AssertionError, LookupError, RuntimeError, TypeError):
        pass  # what they raise over a replaced convolution
    return module  # type: ignore[no-any-return]


def count_groups(module: Any) -> None:
    """Tells a block of timm's the groups of its convolution, of which it remembers how many they were at first."""
    convolutions = (own for name, own in module.named_modules() if name.startswith("conv_kxk"))
    own = next((own for own in convolutions if isinstance(own, nn.Conv2d)), None)
    if own is not None and hasattr(module, "groups"):
        module.groups = own.groups


@torch.no_grad()
def fold_norms(network: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any] | None = None) -> None:
    """Folds in place each batch norm into the convolution that wrote what it reads in a run on these arguments; what
    else a norm does (an activation) stays. In evaluation mode, and for networks in which nothing but the norm reads
    such a convolution: outputs are then the same up to rounding."""
    for conv, path in _normed(network, arguments, keywords or {}):
        norm: Any = network.get_submodule(path)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight, conv.bias = weight, bias
        network.set_submodule(path, getattr(norm, "act", None) or nn.Identity())


def _normed(network: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[tuple[nn.Conv2d, str]]:
    """Each convolution that runs once, with the path of the batch norm that reads what it wrote."""
    wrote: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensor is kept, or another would get its id
    found: list[tuple[nn.Conv2d, str]] = []
    ran: list[int] = []

    def after(module: nn.Conv2d, inputs: Any, output: Tensor) -> None:
        wrote[id(output)] = module, output
        ran.append(id(module))

    def before(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            ran.append(id(module))
            if id(inputs[0]) in wrote:
                found.append((wrote[id(inputs[0])][0], path))

        return hook

    with ExitStack() as stack:
        for path, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                stack.callback(module.register_forward_hook(after).remove)
            elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                stack.callback(module.register_forward_pre_hook(before(path)).remove)
        network(*arguments, **keywords)
    once = {module for module in ran if ran.count(module) == 1}
    return [(conv, path) for conv, path in found if {id(conv), id(network.get_submodule(path))} <= once]
