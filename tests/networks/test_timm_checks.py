"""timm's own checks of its models (its tests/test_models.py), on loaded exports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, family, real
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from nas_kd.results.export import Card, export, load
from nas_kd.students.inheritance import inherit_student

NAMES = ["mobilenetv2_100", "convnext_atto"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "tf_efficientnet_lite0", "regnety_004")]


@pytest.fixture(scope="module", params=[*NAMES, *OTHERS])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder with a student whose blocks, kinds and streams changed, and an image for it."""
    subject = family(request.param)
    student = inherit_student(real(request.param), subject.analysis, subject.genotype(3))
    side = FAMILIES.get(request.param, 64)
    folder = tmp_path_factory.mktemp("timm") / request.param
    export(student, folder, Card(input_size=(3, side, side)))
    return folder, torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def _check_levels(levels: list[Tensor], info: Any, image: Tensor) -> None:
    assert len(levels) == len(info.channels()) >= 3
    for channels, reduction, level in zip(info.channels(), info.reduction(), levels, strict=True):
        assert (level.shape[0], level.shape[1]) == (1, channels)
        assert max(level.shape[-2:]) <= math.ceil(image.shape[-1] / reduction) + 1
        assert not torch.isnan(level).any()


@pytest.mark.parametrize("cls", [None, "getter", "hook"])
def test_features(exported: tuple[Path, Tensor], cls: str | None) -> None:
    folder, image = exported
    given = {} if cls is None else {"feature_cls": cls}
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, **given).eval()
    _check_levels(model(image), model.feature_info, image)


def test_intermediates_also_with_checkpointing(exported: tuple[Path, Tensor]) -> None:
    folder, image = exported
    model: Any = load(folder).eval()
    final, levels = model.forward_intermediates(image, output_fmt="NCHW")
    _check_levels(levels, timm.models.FeatureInfo(model.feature_info, len(model.feature_info)), image)
    torch.testing.assert_close(final, model.forward_features(image))
    model.set_grad_checkpointing()
    again, _ = model.forward_intermediates(image, output_fmt="NCHW")
    torch.testing.assert_close(again, final, rtol=1e-4, atol=1e-5)


def test_pruning_of_intermediate_layers(exported: tuple[Path, Tensor]) -> None:
    folder, image = exported
    model: Any = load(folder).eval()
    wanted = model.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert list(model.prune_intermediate_layers([0, 1], prune_norm=True, prune_head=True)) == [0, 1]
    assert sum(parameter.numel() for parameter in model.parameters()) < whole
    for level, expected in zip(
        model.forward_intermediates(image, indices=[0, 1], intermediates_only=True), wanted, strict=True
    ):
        assert torch.equal(level, expected)


def test_every_parameter_learns_in_a_head_of_another_size(exported: tuple[Path, Tensor]) -> None:
    folder, image = exported
    model = load(folder, num_classes=42).train()
    outputs = model(torch.cat([image, -image]))
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_fx(exported: tuple[Path, Tensor]) -> None:
    folder, image = exported
    model = load(folder).eval()
    how = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train, last = (nodes[-1] for nodes in get_graph_node_names(model, tracer_kwargs=how))
    traced = create_feature_extractor(model, train_return_nodes=[train], eval_return_nodes=[last], tracer_kwargs=how)
    with torch.inference_mode():
        assert torch.equal(traced(image)[last], model(image))
