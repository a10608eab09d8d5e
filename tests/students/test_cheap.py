"""The cheap form of a base, and what it costs."""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch
from torch import nn

import nas_kd.models  # noqa: F401  registers the models
from nas_kd.analysis.stride_reduction import reduce_stride
from nas_kd.analysis.structure import Analysis
from nas_kd.costs.cost_table import CostTable, cost_table
from nas_kd.costs.verification import analyse, measure
from nas_kd.errors import ModelError
from nas_kd.students.building import build_student
from nas_kd.students.cheap import cheap_genotype

SIZE = (3, 32, 32)


@cache
def known(name: str) -> tuple[nn.Module, Analysis, CostTable]:
    with torch.device("meta"):
        base = timm.create_model(name, num_classes=10)
    if name.startswith("mobilenet"):
        reduce_stride(base, 8, 3)
    analysis = analyse(base, SIZE, name=name, open={"conv"})
    return base, analysis, cost_table(analysis, base)


@pytest.mark.parametrize(
    ("name", "conv", "params", "macs"),
    [
        # MACs as in docs/papers.md: our cheap convolutions stride in their spatial part, so fewer than the authors'
        ("cifar_resnet56_cheap", "depthwise", 119_818, 19_188_352),
        ("cifar_resnet56_cheap", "shift", 102_106, 14_598_784),
        ("cifar_resnet56_cheap", "group4", 311_194, 45_564_544),
        ("cifar_vgg16_bn", "depthwise", 1_687_242, 38_018_048),
        ("cifar_vgg16_bn", "shift", 1_653_834, 36_377_600),
        ("cifar_vgg16_bn", "group4", 5_137_482, 107_156_480),
        ("mobilenetv2_100", "shift", 2_172_458, 82_096_640),
    ],
)
def test_counts_of_the_built_model_and_of_the_closed_form(name: str, conv: str, params: int, macs: int) -> None:
    base, analysis, table = known(name)
    genotype = cheap_genotype(analysis, conv)
    assert {choice.conv for choice in genotype.values()} == {conv}
    cost = table.cost(genotype)
    assert (cost.params, cost.macs) == (params, macs)
    assert measure(build_student(base, analysis, genotype), SIZE) == cost


@pytest.mark.parametrize(
    ("conv", "params", "macs"),
    [
        ("standard", 272_474, 40_813_184),
        ("depthwise", 40_522, 7_938_688),
        ("shift", 34_906, 5_948_032),
        ("group4", 98_842, 20_103_808),
    ],
)
def test_the_small_network_in_the_authors_form(conv: str, params: int, macs: int) -> None:
    with torch.device("meta"):
        cost = measure(timm.create_model("cifar_resnet20_cheap", conv=conv), SIZE)
    assert (cost.params, cost.macs) == (params, macs)


def test_a_kind_that_no_block_offers_is_refused() -> None:
    base = timm.create_model("mobilenetv2_050")
    with pytest.raises(ModelError, match="no convolution of tiny can become 'depthwise': it offers shift"):
        cheap_genotype(analyse(base, SIZE, name="tiny", open={"conv"}), "depthwise")
