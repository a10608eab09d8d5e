from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import FAMILIES, FEW, family, narrowest, real
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nas_kd.costs.verification import analyse
from nas_kd.errors import GenotypeError
from nas_kd.genotype import Choice, Genotype
from nas_kd.networks.plan import Plan, apply_plan, plan_of
from nas_kd.students.building import build_student, student_plan
from nas_kd.students.inheritance import inherit_student, inherit_tensors

SEEDS = st.integers(0, 2**32 - 1)
# no statistics over channels: an absent channel is then the same as one that is zero
ABSENT_IS_ZERO = sorted(FAMILIES.keys() - {"nfnet_l0", "dm_nfnet_f0", "convnextv2_atto", "vgg11_bn"})  # and VGG is slow


def _image(name: str, batch: int = 1, **kind: torch.dtype) -> Tensor:
    return torch.randn(batch, 3, FAMILIES[name], FAMILIES[name], generator=torch.Generator().manual_seed(0)).to(**kind)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "mixnet_s", "nfnet_l0", "convnextv2_atto"])
def test_identity_is_the_base(name: str) -> None:
    network, subject = real(name), family(name)
    student = build_student(network, subject.analysis, subject.analysis.identity)
    assert type(student) is type(network)
    assert list(student.state_dict()) == list(network.state_dict())
    assert torch.equal(student(_image(name)), network(_image(name)))
    assert plan_of(student) == Plan()


# what others show too is for the long run
SHOWN_BY_OTHERS = ("resnet50", "resnest26d", "mobilenetv2_100")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SHOWN_BY_OTHERS else ()) for name in ABSENT_IS_ZERO],
)
def test_narrowing_equals_zeroing(name: str) -> None:
    """The student without some channels computes what the base computes when those channels are zero."""
    network, subject = real(name).double(), family(name)
    genotype = subject.widths(seed=1)
    mask = subject.analysis.keep_mask(genotype, np.random.default_rng(1).random(subject.analysis.labels))
    student = build_student(network, subject.analysis, genotype)
    inherit_tensors(student, network, subject.analysis, mask)
    image = _image(name, dtype=torch.float64)
    zeroed = _zeroed(network, subject.analysis.trace.axes, mask)(image)
    assert (zeroed - network(image)).abs().max() > 1e-3 * zeroed.abs().max()  # the test would notice
    torch.testing.assert_close(student(image), zeroed, rtol=1e-9, atol=1e-9 * zeroed.abs().max().item())


def _zeroed(network: nn.Module, axes: dict[str, tuple[np.ndarray | None, ...]], mask: np.ndarray) -> nn.Module:
    zeroed = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in zeroed.named_parameters():
            for dim, labels in enumerate(axes[name]):
                if labels is not None:
                    parameter.index_fill_(dim, torch.from_numpy(np.flatnonzero(~mask[labels])), 0.0)
    return zeroed


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv2_100", "tf_efficientnet_lite0", "nfnet_l0", "convnext_atto", "regnety_004", "repvgg_a0"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_parameter_gets_a_gradient(name: str, seed: int) -> None:
    network, subject = real(name), family(name)
    student = inherit_student(network, subject.analysis, subject.genotype(seed)).train()
    student(_image(name, batch=2)).square().sum().backward()
    idle = [key for key, parameter in student.named_parameters() if parameter.grad is None]
    assert idle == []
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_base_and_student_share_no_memory(name: str) -> None:
    network, subject = real(name), family(name)
    before = copy.deepcopy(network.state_dict())
    student = inherit_student(network, subject.analysis, subject.genotype(3))
    with torch.no_grad():
        for tensor in (*student.parameters(), *student.buffers()):
            tensor.fill_(7)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "regnety_004", "inception_v3", "convnext_atto"])
def test_timm_methods_keep_working(name: str) -> None:
    network, subject = real(name), family(name)
    student = build_student(network, subject.analysis, subject.genotype(5)).eval()
    image = _image(name)
    features = student.forward_features(image)
    pre_logits = student.forward_head(features, pre_logits=True)
    assert features.shape[1] == student.num_features
    assert pre_logits.shape == (1, student.head_hidden_size)
    assert torch.equal(student.get_classifier()(pre_logits), student(image))
    student.reset_classifier(4)
    assert student(image).shape == (1, 4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "regnety_004", "cspresnet50", "convnext_atto"])
def test_feature_info_tells_the_channels(name: str) -> None:
    network, subject = real(name), family(name)
    narrow = Genotype.of({block.name: narrowest(block.choices) for block in subject.analysis.blocks})
    student = build_student(network, subject.analysis, narrow).eval()
    info = student.feature_info
    levels = info.info if hasattr(info, "info") else info
    seen: dict[str, int] = {}
    hooks = [
        student.get_submodule(level["module"]).register_forward_hook(
            lambda _, inputs, output, level=level: seen.update(
                {level["module"]: (inputs[0] if level.get("hook_type") == "forward_pre" else output).shape[1]}
            )
        )
        for level in levels
    ]
    student(_image(name))
    assert len(hooks) == len(levels)
    assert {level["module"]: level["num_chs"] for level in levels} == seen


def test_what_a_base_remembers_of_a_forward_pass_is_no_hindrance() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
            self.kept: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.kept["bias"] = self.head.bias * 2
            return self.head(self.conv(x)).mean((2, 3)) + self.kept["bias"]

    network = Base()
    analysis = analyse(network, (3, 8, 8))
    image = torch.randn(1, 3, 8, 8)
    network(image)
    student = build_student(network, analysis, analysis.identity)
    assert torch.equal(student(image), network(image))


def test_training_helpers_keep_working() -> None:
    name = "resnet18"
    network, subject = real(name), family(name)
    student = build_student(network, subject.analysis, subject.genotype(2))
    assert student.group_matcher().keys() == network.group_matcher().keys()
    image = _image(name).to(memory_format=torch.channels_last)
    expected = student(image)
    torch.testing.assert_close(student.to(memory_format=torch.channels_last)(image), expected, rtol=1e-4, atol=1e-3)
    student.set_grad_checkpointing()
    student.train()(_image(name, batch=2)).sum().backward()
    assert student.conv1.weight.grad is not None


@pytest.mark.parametrize("name", ["resnet18", "mixnet_s", "tf_efficientnet_lite0", "dm_nfnet_f0", "res2net50_26w_4s"])
@FEW
@given(seed=SEEDS)
def test_plan_alone_rebuilds_the_student(name: str, seed: int) -> None:
    subject = family(name)
    student = build_student(subject.network, subject.analysis, subject.genotype(seed))
    again = apply_plan(copy.deepcopy(subject.network), Plan.from_json(plan_of(student).to_json()))
    shapes = {key: value.shape for key, value in student.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes


def test_a_student_is_a_base_again() -> None:
    """Plans add up: the student of a student comes from one plan on timm's own model."""
    subject = family("resnet18")
    first = Plan(edits=dict(student_plan(subject.network, subject.analysis, subject.widths(seed=4)).edits))
    student = build_student(subject.network, subject.analysis, subject.widths(seed=4))
    assert plan_of(student).edits == first.edits
    assert plan_of(student).then(Plan()) == plan_of(student)


def test_a_genotype_must_fit() -> None:
    subject = family("resnet18")
    identity = dict(subject.analysis.identity)
    with pytest.raises(GenotypeError, match=r"no block 'layer1\.7'; did you mean 'layer1\.\d'\?"):
        build_student(subject.network, subject.analysis, {**identity, "layer1.7": Choice()})
    with pytest.raises(GenotypeError, match=r"width=0\.9.* is not open to block 'layer1\.0': it offers width"):
        build_student(subject.network, subject.analysis, {**identity, "layer1.0": Choice(width=0.9)})
    del identity["layer1.0"]
    with pytest.raises(GenotypeError, match=r"lacks block 'layer1\.0' of resnet18"):
        build_student(subject.network, subject.analysis, identity)
