"""The cost of channels as a polynomial, beside the table of costs, and the strengths of channels."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import nas_kd.models  # noqa: F401  registers the models
from nas_kd.analysis.structure import Analysis, Block
from nas_kd.budget import KINDS
from nas_kd.costs.cost_table import CostTable, cost_table
from nas_kd.costs.verification import analyse
from nas_kd.genotype import Genotype
from nas_kd.learnt_widths.channel_cost import channel_cost, kept_counts, segments_of
from nas_kd.learnt_widths.scale_factors import FILTERS, NORMS, ScaleFactors
from nas_kd.students.unit_importance import unit_importance

BASES: dict[str, tuple[int, dict[str, Any]]] = {
    "cifar_resnet20": (32, {}),  # an option-A shortcut
    "mobilenetv2_035": (32, {}),  # two norms scale one unit
    "vgg11_bn": (32, {"mlp_ratio": 1 / 32}),  # the width of one block is read by the next; a head without norms
    "efficientnet_b0": (32, {}),  # squeeze and excitation: a second kind of channels in a block
    "convnext_atto": (32, {}),  # no batch norm
}


@cache
def known(name: str, *, stages: bool = False) -> tuple[nn.Module, Analysis, CostTable]:
    size, given = BASES[name]
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10, **given)
    opened = {"width", "stages"} if stages else {"width"}
    analysis = analyse(network, (3, size, size), name=name, open=opened)
    return network, analysis, cost_table(analysis, network)


def drawn(table: CostTable, seed: int) -> Genotype:
    generator = np.random.default_rng(seed)
    return table.genotype([int(generator.integers(len(block.choices))) for block in table.blocks])


@pytest.mark.parametrize(("name", "stages"), [*((name, False) for name in BASES), ("vgg11_bn", True)])
def test_at_the_counts_of_a_genotype_it_is_the_table(name: str, stages: bool) -> None:
    network, analysis, table = known(name, stages=stages)
    cost = channel_cost(analysis, network)
    for genotype in (analysis.identity, *(drawn(table, seed) for seed in range(5))):
        expected = table.cost(genotype)
        assert cost.total(kept_counts(analysis, genotype)).tolist() == [expected[kind] for kind in KINDS]


@pytest.mark.parametrize("name", ["cifar_resnet20", "vgg11_bn"])
def test_what_a_block_costs_is_what_the_table_saves_without_its_channels(name: str) -> None:
    """G_b where all channels are kept, and where one block keeps fewer beside the others as they are."""
    network, analysis, table = known(name)
    cost, base = channel_cost(analysis, network), table.base()
    whole = cost.by_block(kept_counts(analysis, analysis.identity))
    for index, block in enumerate(analysis.blocks):
        for width in block.widths[1:]:
            alone = Genotype.of({b.name: _at(b, width) if b is block else b.default for b in analysis.blocks})
            saved = (whole - cost.by_block(kept_counts(analysis, alone)))[index]
            expected = table.cost(alone)
            assert saved.tolist() == pytest.approx([base[kind] - expected[kind] for kind in KINDS])


def _at(block: Block, width: float) -> Any:
    return next(choice for choice in block.choices if choice.width == width)


def test_a_block_of_a_resnet_by_hand() -> None:
    """layer1.0 of a ResNet-20: 16 inner channels between two 3×3 convolutions of 16, at 32×32, a batch norm on them."""
    network, analysis, _ = known("cifar_resnet20")
    counts = kept_counts(analysis, analysis.identity)
    position = [block.name for block in analysis.blocks].index("layer1.0")
    params, macs = channel_cost(analysis, network).by_block(counts)[position].tolist()
    assert params == 2 * 9 * 16 * 16 + 2 * 16
    assert macs == 2 * 9 * 16 * 16 * 32 * 32


def test_the_gradient_is_what_a_channel_costs_beside_the_others_as_they_are() -> None:
    network, analysis, _ = known("vgg11_bn")
    cost = channel_cost(analysis, network)
    counts = (0.7 * kept_counts(analysis, analysis.identity)).requires_grad_()
    (gradient,) = torch.autograd.grad(cost.by_block(counts)[:, 1].sum(), counts)
    for number in (0, 3):
        more = counts.detach().clone()
        more[number] += 1
        assert gradient[number].item() == pytest.approx((cost.total(more) - cost.total(counts))[1].item())


def test_strengths_begin_as_the_importance_and_follow_the_scale_factors() -> None:
    network, analysis, _ = known("cifar_resnet20")
    network = copy.deepcopy(network)
    scales = ScaleFactors(network, analysis)
    units = np.concatenate([segment.units for segment in segments_of(analysis)])
    before = scales.strengths().detach()
    assert before.numpy() == pytest.approx(unit_importance(network, analysis)[units])
    assert scales.scales().tolist() == pytest.approx([1.0] * len(units))
    with torch.no_grad():
        network.get_submodule("layer1.0.bn1").weight[3] = -0.25  # its sign does not matter
    ratio = (scales.strengths() / before).detach()
    assert ratio[3].item() == pytest.approx(0.25)
    assert ratio[4:].tolist() == pytest.approx([1.0] * (len(units) - 4))


def test_all_norms_of_a_channel_count_and_other_channels_get_no_gradient() -> None:
    network, analysis, _ = known("mobilenetv2_035")
    scales = ScaleFactors(network, analysis)
    names = [analysis.blocks[segment.block].name for segment in segments_of(analysis)]
    mine = scales.scales()[scales.segment == names.index("blocks.1.0")]
    gradients = torch.autograd.grad(mine.sum(), list(network.parameters()), allow_unused=True)
    named = zip(network.named_parameters(), gradients, strict=True)
    touched = {name for (name, _), gradient in named if gradient is not None and gradient.any()}
    assert touched == {"blocks.1.0.bn1.weight", "blocks.1.0.bn2.weight"}
    assert mine.tolist() == pytest.approx([2**0.5] * len(mine))  # both γ are 1


@pytest.mark.parametrize(
    ("name", "sources"),
    [("cifar_resnet20", {NORMS}), ("efficientnet_b0", {NORMS, FILTERS}), ("convnext_atto", {FILTERS})],
)
def test_where_no_norm_scales_a_channel_its_filter_does(name: str, sources: set[str]) -> None:
    network, analysis, _ = known(name)
    scales = ScaleFactors(network, analysis)
    assert set(scales.sources) == sources
    first = scales.sources.index(FILTERS) if FILTERS in sources else None
    if first is not None:
        (producer,) = segments_of(analysis)[first].producers
        norms = network.get_submodule(producer).weight.flatten(1).norm(dim=1)
        assert scales.scales()[scales.segment == first].tolist() == pytest.approx(norms.tolist(), rel=1e-5)
