"""The timm models that are covered, and how tests choose among their students."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from hypothesis import settings
from torch import nn
from torch.overrides import TorchFunctionMode

import nas_kd.models  # noqa: F401  registers the CIFAR models
from nas_kd.analysis.blocks import ASPECTS
from nas_kd.analysis.structure import Analysis
from nas_kd.budget import COUNTED, Cost
from nas_kd.costs.cost_table import CostTable, cost_table
from nas_kd.costs.verification import analyse
from nas_kd.genotype import Choice, Genotype

FEW = settings(max_examples=2)  # where each example builds a network

COVERED = (
    "resnet18 resnet50 resnet26d seresnet50 resnext50_32x4d wide_resnet50_2 res2net50_26w_4s resnest26d skresnet18 "
    "densenet121 vgg11_bn vgg16_bn mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small "
    "efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_s mnasnet_100 fbnetc_100 mixnet_s tinynet_e lcnet_050 "
    "ghostnet_100 repghostnet_050 repvgg_a0 mobileone_s0 regnetx_002 regnety_004 cspresnet50 darknet53 cspdarknet53 "
    "dla34 hrnet_w18_small ese_vovnet19b_dw selecsls42 inception_v3 inception_v4 xception41 rexnet_100 hardcorenas_a "
    "nfnet_l0 dm_nfnet_f0 convnext_atto convnextv2_atto fastvit_t8 starnet_s1 edgenext_xx_small"
).split()

# not covered, but interesting: blurred pooling, attention in and out of windows, cells, dual paths, hybrids
OTHERS = (
    "resnetblur50 tresnet_m resnetv2_50 bat_resnext26ts lambda_resnet26t halonet26t sebotnet33ts_256 dpn68 "
    "nasnetalarge regnetz_b16 mobilenetv4_hybrid_medium mobilevit_xxs efficientvit_b0 efficientvit_m0 "
    "efficientformer_l1 levit_128 focalnet_tiny_srf repvit_m1 rdnet_tiny hgnetv2_b0 ghostnetv3_100 inception_next_atto "
    "convmixer_768_32"
).split()

# pixels of a side at which each offers the choices of its own size, and its last map still is more than one pixel: of
# one pixel most channels of a shift see nothing but padding
SIDES = {name: 107 if name.startswith("inception") else 64 for name in COVERED}

# ours, for 32×32 images
CIFAR = ("cifar_resnet20", "cifar_resnet56", "cifar_resnet56_cheap", "cifar_vgg16_bn")

# one of each family, with the pixels of a side that it needs at least; the default suite runs over these
FAMILIES = {
    "resnet18": 32,
    "resnet50": 32,
    "mobilenetv2_100": 32,
    "vgg11_bn": 32,
    "resnext50_32x4d": 32,  # grouped
    "resnest26d": 64,  # radix: few groups
    "res2net50_26w_4s": 32,  # split by a number kept in the block
    "skresnet18": 32,
    "mobilenetv3_small_100": 32,  # squeeze-and-excite
    "tf_efficientnet_lite0": 64,  # TensorFlow's padding
    "mixnet_s": 32,  # mixed kernels
    "ghostnet_100": 32,
    "repvgg_a0": 32,  # branches to be fused
    "regnety_004": 32,
    "cspresnet50": 32,
    "dla34": 64,
    "inception_v3": 75,  # concatenations
    "nfnet_l0": 32,  # weight-standardised
    "dm_nfnet_f0": 32,
    "convnext_atto": 32,  # layer scale, linear layers
    "convnextv2_atto": 32,
    "lcnet_050": 32,
    "starnet_s1": 32,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Base:
    """An analysed network on the meta device."""

    network: nn.Module
    analysis: Analysis
    table: CostTable

    @property
    def input_size(self) -> tuple[int, ...]:
        return self.analysis.input_size

    def genotype(self, seed: int) -> Genotype:
        """A random genotype."""
        rng = np.random.default_rng(seed)
        return self.table.genotype([int(rng.integers(len(block.choices))) for block in self.table.blocks])

    def widths(self, seed: int) -> Genotype:
        """A genotype of random widths, all else as in the base."""
        rng = np.random.default_rng(seed)
        chosen = {block.name: rng.choice(block.widths) for block in self.table.blocks}
        return Genotype.of({b.name: next(c for c in b.choices if c.width == chosen[b.name]) for b in self.table.blocks})


class Undrawn(TorchFunctionMode):
    """Leaves out what draws the weights of a network while it is made: nobody looks at them, and on the meta device
    each tensor takes milliseconds."""

    _DRAWS = frozenset((torch.Tensor.normal_, torch.Tensor.uniform_))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func in self._DRAWS else func(*args, **(kwargs or {}))


shared: list[Path] = []  # the folder in which the processes of one run keep their analyses, where there is one


@cache
def base(name: str, side: int, classes: int = 10, opened: tuple[str, ...] = ASPECTS) -> Base:
    """A timm model on the meta device, analysed at side×side pixels; made once in all processes of a run."""
    with torch.device("meta"), Undrawn():
        network = timm.create_model(name, num_classes=classes).eval()
    files = [folder / "-".join([name, str(side), str(classes), *opened]) for folder in shared]
    if known := [file for file in files if file.exists()]:
        analysis: Analysis = pickle.loads(known[0].read_bytes())
    else:
        analysis = analyse(network, (3, side, side), name=name, open=opened)
    for file in files:
        draft = file.with_name(f"{file.name}.{os.getpid()}")
        draft.write_bytes(pickle.dumps(analysis))
        draft.replace(file)
    return Base(network=network, analysis=analysis, table=cost_table(analysis, network))


def family(name: str) -> Base:
    """One of `FAMILIES` at its own size."""
    return base(name, FAMILIES[name])


def real(name: str, seed: int = 0) -> nn.Module:
    """A timm model with weights in which no channel is idle: none zero, batch norms that do something."""
    with Undrawn():
        network: nn.Module = timm.create_model(name, num_classes=10)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
        for buffer_name, buffer in network.named_buffers():
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif buffer_name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    return network.eval()


def kinds(cost: Cost) -> dict[str, int]:
    """Every kind of a cost: costs are equal when params and macs are."""
    return {kind: cost[kind] for kind in COUNTED}


def narrowest(block_choices: tuple[Choice, ...]) -> Choice:
    """The choice of the least width, as in the base otherwise."""
    return min(block_choices, key=lambda choice: choice.width)
