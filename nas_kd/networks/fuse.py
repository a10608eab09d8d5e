"""The inference form of re-parameterised networks (RepVGG, MobileOne, FastViT, RepGhost)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import nn

from nas_kd.networks.folding import fold
from nas_kd.networks.plan import plan_of

Network = TypeVar("Network", bound=nn.Module)


def fused(network: Network) -> Network:
    """A copy of `network` in which branches that only training needs are folded into one convolution each.

    As `timm.utils.reparameterize_model`, and with its outputs up to rounding; but a block of a student whose branches
    can no longer be added up, since one of them has become a cheap convolution or has another kernel size, stays. The
    copy can be exported; it cannot be searched.
    """
    result: Any = copy.deepcopy(network).eval()
    fold(result)
    result.nas_kd_plan = replace(plan_of(network), fused=True)
    return cast(Network, result)
