"""The inference form of re-parameterised networks (RepVGG, MobileOne, FastViT, RepGhost)."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def fused(network: Network) -> Network:
    """A copy of `network` in which branches that only training needs are folded into one convolution each.

    As `timm.utils.reparameterize_model`, and with its outputs up to rounding; but a block of a student whose branches
    can no longer be added up, since one of them has become a cheap convolution or has another kernel size, stays.
    """
    result = copy.deepcopy(network).eval()
    _fuse(result)
    return result


def _fuse(network: nn.Module) -> None:
    for name, child in network.named_children():
        setattr(network, name, _folded(child))
        _fuse(network.get_submodule(name))


def _folded(module: Any) -> nn.Module:
    """The inference form of one module, or the module itself where it has none."""
    draft: Any = copy.deepcopy(module)  # a module may fail when it is half done
    try:
        if hasattr(draft, "fuse"):
            return draft.fuse()  # type: ignore[no-any-return]
        for method in ("reparameterize", "switch_to_deploy"):
            if hasattr(draft, method):
                getattr(draft, method)()
                return draft  # type: ignore[no-any-return]
    except (AttributeError, AssertionError, RuntimeError, TypeError):  # what they raise over a replaced convolution
        pass
    return module  # type: ignore[no-any-return]
