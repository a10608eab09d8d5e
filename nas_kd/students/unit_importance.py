"""Orders the channels of a base by its weights alone: what produces a channel times what reads it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nas_kd.analysis.structure import Analysis


def unit_importance(base: nn.Module, analysis: Analysis) -> NDArray[np.float64]:
    """For each label the norm of the weights that produce it times the norm of those that read it.

    Producers count as their batch norm scales them (γ/σ). On a CIFAR ResNet this keeps better channels than |γ|.
    """
    produced, read = np.zeros(analysis.labels), np.zeros(analysis.labels)
    gains = _norm_gains(base, analysis)
    parameters = dict(base.named_parameters())
    for name, axes in analysis.trace.axes.items():
        weight = parameters.get(name)
        if weight is None or weight.ndim < 2 or axes[0] is None:
            continue
        np.add.at(produced, axes[0], _squared_norms(weight, 0) * gains[axes[0]])
        if axes[1] is not None:
            np.add.at(read, axes[1], _squared_norms(weight, 1))
    read[read == 0] = 1.0
    importance: NDArray[np.float64] = np.sqrt(produced * read)
    return importance


def _squared_norms(weight: Tensor, dim: int) -> NDArray[np.float64]:
    others = [other for other in range(weight.ndim) if other != dim]
    norms: NDArray[np.float64] = torch.linalg.vector_norm(weight.detach(), dim=others).double().square().cpu().numpy()
    return norms


def _norm_gains(base: nn.Module, analysis: Analysis) -> NDArray[np.float64]:
    gains = np.ones(analysis.labels)
    for name, module in base.named_modules():
        if not isinstance(module, nn.BatchNorm2d) or module.running_var is None or module.weight is None:
            continue
        labels = analysis.trace.axes.get(f"{name}.weight", (None,))[0]
        if labels is not None:
            gain = module.weight.detach().double().square() / (module.running_var.double() + module.eps)
            gains[labels] = gain.cpu().numpy()
    return gains
