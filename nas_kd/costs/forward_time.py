"""How long a forward pass takes on one core, predicted from the network alone: the same on every machine, so that
decisions made by it are too."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from nas_kd.analysis.structure import Analysis

# a second of one core: fitted to resnet18 and tf_efficientnet_lite0 at 128 px (14.2 and 11.0 ms an image)
_MACS = 54e9
_ELEMENTS = 0.26e9  # that convolutions write, what follows each of them included
STEP = 4.2  # forward passes that a training step takes: 4.1 to 4.3 on both


def module_seconds(base: nn.Module, analysis: Analysis) -> Mapping[str, float]:
    """By path of each convolution and linear layer, the seconds that it and what follows it take for one image."""
    weights = {name.removesuffix(".weight"): tensor for name, tensor in base.named_parameters()}
    found: dict[str, float] = defaultdict(float)
    for call in analysis.trace.calls:
        macs = call.factor * math.prod(map(len, call.axes))
        weight = weights.get(call.module)
        written = 0.0 if weight is None else macs / max(1, weight[0].numel())
        found[call.module] += macs / _MACS + written / _ELEMENTS
    return found


def forward_seconds(base: nn.Module, analysis: Analysis) -> float:
    """The seconds that one image takes through the whole network."""
    return sum(module_seconds(base, analysis).values())
