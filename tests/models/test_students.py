"""What is promised of the students of every covered model: they cost what the table says, an export of them loads bit
by bit, and a gradient reaches all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from families import COVERED, SIDES, base, kinds, real
from torch import Tensor, nn

from nas_kd.models.inherit import inherit_student, unit_importance
from nas_kd.models.verify import measure
from nas_kd.results.export import export, load

MANY, FEW = 20, 1  # random students of a model
DRAWS = 5  # of weights, in one of which a gradient must reach a parameter
QUICK = (
    "resnet18 mobilenetv2_100 resnext50_32x4d res2net50_26w_4s skresnet18 mobilenetv3_small_100 mixnet_s ghostnet_100 "
    "repvgg_a0 regnety_004 cspresnet50 nfnet_l0 convnext_atto lcnet_050 starnet_s1 edgenext_xx_small"
).split()


@pytest.mark.parametrize("name", QUICK)
def test_a_few_students(name: str, tmp_path: Path) -> None:
    _check_students(name, range(FEW), tmp_path)


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
