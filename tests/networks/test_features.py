"""What timm and torch offer for a base, they offer for its students."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import timm
import torch
from families import FAMILIES, base, family, real
from timm.models import group_parameters
from timm.utils import reparameterize_model
from torch import Tensor, nn

from nas_kd.costs.verification import analyse
from nas_kd.errors import ModelError, PlanError
from nas_kd.genotype import Genotype
from nas_kd.networks.fuse import fused
from nas_kd.networks.plan import Plan, plan_of
from nas_kd.results.export import export, load
from nas_kd.students.inheritance import inherit_student

SOME = [
    "resnet18",
    "mobilenetv2_100",
    "regnety_004",
    "tf_efficientnet_lite0",
    "convnext_atto",
    "cspresnet50",
    "nfnet_l0",
]
OPEN = ("width", "kernel", "conv", "stages", "keep")


def _student(name: str, seed: int = 1) -> nn.Module:
    subject = family(name)
    return inherit_student(real(name), subject.analysis, subject.genotype(seed)).eval()


def _image(name: str, batch: int = 1) -> Tensor:
    side = FAMILIES.get(name, 64)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def _close(actual: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * expected.abs().max().item())


@pytest.mark.parametrize("name", SOME)
def test_heads(name: str) -> None:
    student = _student(name)
    features = student.forward_features(_image(name))
    pre_logits = student.forward_head(features, pre_logits=True)
    assert (features.shape[1], pre_logits.shape[1]) == (student.num_features, student.head_hidden_size)
    _close(student.get_classifier()(pre_logits), student(_image(name)))


@pytest.mark.parametrize("name", SOME)
def test_every_parameter_has_a_group(name: str) -> None:
    student = _student(name)
    groups = group_parameters(student, student.group_matcher())
    assert sum(map(len, groups.values())) == len(list(student.parameters()))


@pytest.mark.parametrize("name", [name for name in SOME if name != "cspresnet50"])  # timm has none for it
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    student = _student(name)
    image = _image(name, batch=2)
    student(image).sum().backward()
    expected = {key: parameter.grad for key, parameter in student.named_parameters()}
    again = copy.deepcopy(student)
    again.zero_grad()
    again.set_grad_checkpointing()
    again(image).sum().backward()
    for key, parameter in again.named_parameters():
        _close(parameter.grad, expected[key])


@pytest.mark.parametrize("name", SOME)
def test_channels_last(name: str) -> None:
    student = _student(name)
    image = _image(name)
    with torch.no_grad():
        expected = student(image)
        actual = student.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
    _close(actual, expected, share=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "regnety_004"])
def test_export_of_torch(name: str) -> None:
    student, image = _student(name), _image(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        program = torch.export.export(student, (image,))
    _close(program.module()(image), student(image))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_compile_in_one_graph(name: str) -> None:
    student, image = _student(name), _image(name)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(student, backend="eager", fullgraph=True)
        with torch.no_grad():
            _close(compiled(image), student(image))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto", "cspresnet50"])
def test_streams_and_dropped_blocks_reload(name: str, tmp_path: Path) -> None:
    subject = base(name, FAMILIES[name], opened=OPEN)
    droppable = [block.name for block in subject.analysis.blocks if not all(c.keep for c in block.choices)]
    chosen = {b.name: c for b, c in zip(subject.analysis.blocks, subject.genotype(2).values(), strict=True)}
    chosen[droppable[0]] = next(c for c in subject.analysis.block(droppable[0]).choices if not c.keep)
    stream = next(block for block in subject.analysis.blocks if block.is_stream)
    chosen[stream.name] = stream.choices[-1]
    student = inherit_student(real(name), subject.analysis, Genotype.of(chosen)).eval()
    again = load(export(student, tmp_path / "small")).eval()
    assert torch.equal(again(_image(name)), student(_image(name)))
    assert isinstance(again.get_submodule(droppable[0]), nn.Identity)
    assert plan_of(again) == plan_of(student)
    maps = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True, features_only=True).eval()
    assert [level.shape[1] for level in maps(_image(name))] == maps.feature_info.channels()


FOLDED = {"repvgg_a0": 32, "mobileone_s0": 32, "fastvit_t8": 64, "repghostnet_050": 32}


@pytest.mark.parametrize(("name", "side"), FOLDED.items())
def test_narrow_students_fold_as_their_bases(name: str, side: int) -> None:
    subject, image = base(name, side), torch.randn(1, 3, side, side)
    student = inherit_student(real(name), subject.analysis, subject.widths(1)).eval()
    theirs = reparameterize_model(student)
    with torch.no_grad():
        _close(theirs(image), student(image))
        _close(fused(student)(image), student(image))
    assert sum(p.numel() for p in fused(student).parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(("name", "side"), [("repvgg_a0", 32), ("fastvit_t8", 64)])
def test_students_fold_where_they_can(name: str, side: int) -> None:
    subject, image = base(name, side), torch.randn(1, 3, side, side)
    student = inherit_student(real(name), subject.analysis, subject.genotype(1)).eval()
    with torch.no_grad():
        _close(fused(student)(image), student(image))
    assert sum(p.numel() for p in fused(student).parameters()) < sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0"])
def test_students_with_narrow_streams_fold_whole(name: str) -> None:
    """A depthwise block of timm's remembers how many channels it had: its own folding divides by what is left."""
    subject, image = base(name, 32, opened=OPEN), torch.randn(1, 3, 32, 32)
    chosen = dict(subject.analysis.identity)
    chosen |= {block.name: block.choices[block.narrowest] for block in subject.analysis.blocks if block.is_stream}
    student = inherit_student(real(name), subject.analysis, Genotype.of(chosen)).eval()
    folded = fused(student)
    with torch.no_grad():
        _close(folded(image), student(image))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_an_inference_form_reloads_and_is_no_base(tmp_path: Path) -> None:
    subject, image = base("repvgg_a0", 32), torch.randn(1, 3, 32, 32)
    student = fused(inherit_student(real("repvgg_a0"), subject.analysis, subject.genotype(1)))
    again = load(export(student, tmp_path / "small")).eval()
    assert torch.equal(again(image), student(image))
    assert plan_of(again) == plan_of(student)
    assert again.reset_classifier(3) is None
    assert again(image).shape == (1, 3)
    with pytest.raises(ModelError, match=r"repvgg is in its inference form, .*: search its training form"):
        analyse(again, (3, 32, 32), name="repvgg")
    with pytest.raises(PlanError, match="cannot be changed: begin with its training form"):
        plan_of(again).then(Plan(features=(1,)))
