"""What is promised of the students of every covered model: they cost what the table says, an export of them loads bit
by bit, and a gradient reaches all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from families import COVERED, SIDES, base, kinds, real
from torch import Tensor, nn

from nas_kd.costs.cost_table import cost_table
from nas_kd.costs.verification import analyse, measure
from nas_kd.results.export import export, load
from nas_kd.students.inheritance import inherit_student, unit_importance

MANY, FEW = 20, 1  # random students of a model
DRAWS = 5  # of weights, in one of which a gradient must reach a parameter
QUICK = (
    "resnet18 res2net50_26w_4s skresnet18 mobilenetv3_small_100 mixnet_s ghostnet_100 repvgg_a0 cspresnet50 nfnet_l0 "
    "edgenext_xx_small"
).split()


@pytest.mark.parametrize("name", QUICK)
def test_a_few_students(name: str, tmp_path: Path) -> None:
    _check_students(name, range(FEW), tmp_path)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035"])
def test_students_of_a_dilated_base(name: str, tmp_path: Path) -> None:
    """Dilation in place of stride, as detectors use their bases: kinds, kernels and costs follow it."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10, output_stride=8).eval()
    analysis = analyse(network, (3, 33, 33), name=name)
    table = cost_table(analysis, network)
    dilated = [site.spec for block in analysis.blocks for site in block.sites if site.spec.dilation > 1]
    assert max(spec.dilation for spec in dilated) == 4
    image = torch.randn(1, 3, 33, 33)
    for index in (2, 17):
        genotype = table.genotype([(index + place) % len(block.choices) for place, block in enumerate(table.blocks)])
        student = inherit_student(network, analysis, genotype).eval()
        assert measure(student, (3, 33, 33)) == table.cost(genotype)
        assert student.forward_features(image).shape[-1] == network.forward_features(image).shape[-1] == 5
        assert torch.equal(load(export(student, tmp_path / "small")).eval()(image), student(image))


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERED)
def test_many_students(name: str, tmp_path: Path) -> None:
    _check_students(name, range(MANY), tmp_path)


def _check_students(name: str, seeds: range, folder: Path) -> None:
    subject, network = base(name, SIDES[name]), real(name)
    importance = unit_importance(network, subject.analysis)
    image = torch.randn(1, *subject.input_size, generator=torch.Generator().manual_seed(0))
    theirs = _unreached(network, image)
    for seed in seeds:
        genotype = subject.genotype(seed)
        student = inherit_student(network, subject.analysis, genotype, importance=importance).eval()
        assert kinds(measure(student, subject.input_size)) == kinds(subject.table.cost(genotype))
        again = load(export(student, folder / "small")).eval()
        with torch.no_grad():
            expected = student(image)
            assert expected.isfinite().all()
            assert torch.equal(again(image), expected)
        shutil.rmtree(folder / "small")
        idle = _unreached(student, image) - theirs
        for weights in range(1, DRAWS):  # a ReLU may turn off the few units that are left of a squeeze-and-excite
            if idle:
                idle &= _unreached(inherit_student(real(name, weights), subject.analysis, genotype).eval(), image)
        assert idle == set(), f"seed {seed}"


def _unreached(network: nn.Module, image: Tensor) -> set[str]:
    """The parameters without a gradient, or with one of zeros alone, as frozen batch norms let it through: of two
    images of one pixel, statistics of their own would let none through."""
    output = network(image)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * probe).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
    return {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
