"""What is promised of the students of every covered model: they cost what the table says, an export of them loads bit
by bit, and a gradient reaches all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import COVERED, SIDES, base, kinds, real
from torch import Tensor, nn

from nas_kd.models.inherit import inherit_student, unit_importance
from nas_kd.models.labels import Axes
from nas_kd.models.verify import measure
from nas_kd.results.export import export, load

MANY, FEW = 20, 1  # random students of a model
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
    theirs = _gradients(network, image)
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
        gradients = _gradients(student, image)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        idle = [key for key, gradient in gradients.items() if not gradient.any()]
        mask = subject.analysis.keep_mask(genotype, importance)
        # what stays of a squeeze-and-excite may be units that a ReLU turns off in the base too
        idle = [key for key in idle if key not in theirs or _kept(theirs[key], subject.analysis.trace.axes[key], mask)]
        assert idle == [], f"seed {seed}"


def _kept(gradient: Tensor, axes: Axes, mask: np.ndarray) -> bool:
    """Whether a gradient of the base is not zero in the channels that a student keeps."""
    for dim, labels in enumerate(axes):
        if labels is not None:
            gradient = gradient.index_select(dim, torch.from_numpy(np.flatnonzero(mask[labels])))
    return bool(gradient.any())


def _gradients(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, zeros where there is none, with frozen batch norms: of two images of one pixel,
    statistics of their own would let none through."""
    output = network(image)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * probe).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in network.named_parameters()
    }
    network.zero_grad(set_to_none=True)
    return gradients
