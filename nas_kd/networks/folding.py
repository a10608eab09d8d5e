"""How the branches of re-parameterised networks are folded (RepVGG, MobileOne, FastViT, RepGhost)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def fold(network: nn.Module) -> None:
    """Folds in place what only training needs; a block that cannot be folded any more stays."""
    for name, child in network.named_children():
        setattr(network, name, folded(child))
        fold(network.get_submodule(name))


def folded(module: Any) -> nn.Module:
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
