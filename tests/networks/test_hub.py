from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

import nas_kd.models
from nas_kd.analysis.stride_reduction import reduce_stride
from nas_kd.costs.cost_table import cost_table
from nas_kd.costs.verification import analyse
from nas_kd.errors import ModelError, NasKdError, PlanError
from nas_kd.networks.hub import ENTRY_POINT, base_of, create_base, student_args
from nas_kd.students.building import build_student


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    analysis = analyse(base, (1, 32, 32))
    return build_student(base, analysis, cost_table(analysis, base).cheapest("params"))


def test_importing_registers_one_entry_point() -> None:
    assert timm.is_model(ENTRY_POINT)
    assert nas_kd.networks.hub.ENTRY_POINT == ENTRY_POINT


def test_the_arguments_of_a_student_are_json_and_build_its_shape(student: nn.Module) -> None:
    args = json.loads(json.dumps(student_args(student)))
    assert args["base"] == "test_resnet"
    assert args["base_args"] == {"num_classes": 10, "in_chans": 1, "global_pool": "avg"}
    built = timm.create_model(ENTRY_POINT, **args)
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == shapes
    assert type(built) is type(student)
    assert student_args(built) == student_args(student)


def test_a_students_base_is_that_of_its_base(student: nn.Module) -> None:
    arguments = {"num_classes": 10, "in_chans": 1, "global_pool": "avg"}
    assert base_of(student) == ("test_resnet", arguments)
    built = timm.create_model(ENTRY_POINT, **student_args(student), num_classes=5)
    assert base_of(built) == ("test_resnet", {**arguments, "num_classes": 5})


def test_features_have_the_levels_of_timms_own(student: nn.Module) -> None:
    for base, arguments in (("test_resnet", student_args(student)), ("vgg11_bn", {"base": "vgg11_bn", "plan": PLAIN})):
        with torch.device("meta"):
            expected = timm.create_model(base, features_only=True)
            features = timm.create_model(ENTRY_POINT, features_only=True, **arguments)
        assert features.feature_info.out_indices == expected.feature_info.out_indices
        assert features.feature_info.reduction() == expected.feature_info.reduction()


PLAIN = {"version": 1, "edits": {}, "features": []}


def test_an_empty_plan_is_the_base() -> None:
    torch.manual_seed(0)
    base = timm.create_model("test_efficientnet").eval()
    torch.manual_seed(0)
    built = timm.create_model(ENTRY_POINT, base="test_efficientnet", plan=PLAIN).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(base(image), built(image))


def test_a_reduced_base_is_made_again() -> None:
    base = reduce_stride(timm.create_model("mobilenetv2_050"), 8, 3)
    built = timm.create_model(ENTRY_POINT, **student_args(base))
    strides = [module.stride for module in base.modules() if isinstance(module, nn.Conv2d)]
    assert [module.stride for module in built.modules() if isinstance(module, nn.Conv2d)] == strides


@pytest.mark.parametrize("base", ["no_such_model", ENTRY_POINT])
def test_an_unknown_base_is_refused(base: str) -> None:
    with pytest.raises(ModelError, match=f"unknown timm model '{base}'"):
        timm.create_model(ENTRY_POINT, base=base, plan=PLAIN)


def test_a_plan_of_another_base_is_refused(student: nn.Module) -> None:
    plan = student_args(student)["plan"]
    with pytest.raises(PlanError, match="the plan does not fit"):
        timm.create_model(ENTRY_POINT, base="test_efficientnet", plan=plan)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"base": ""}, "unknown timm model ''"),
        ({"base": 5}, "unknown timm model 5"),
        ({"plan": None}, "the plan is damaged"),
        ({"base_args": {"bogus": 1}}, "cannot be built: .*bogus.*; .* export the model again"),
        ({"base_args": [1]}, "cannot be built: .* export the model again"),
        ({"num_classes": "ten"}, "cannot be built: .* export the model again"),
    ],
)
def test_damaged_arguments_are_one_line(student: nn.Module, damage: dict[str, object], words: str) -> None:
    with pytest.raises(NasKdError, match=words) as caught:
        timm.create_model(ENTRY_POINT, **{**student_args(student), **damage})
    assert "\n" not in str(caught.value)


def test_a_network_of_ones_own_has_no_base() -> None:
    with pytest.raises(ModelError, match=r"Linear is no model of timm.create_model"):
        base_of(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("resnet81", {}, r"timm knows no model 'resnet81'; did you mean 'resnet.*'\?; see timm.list_models\(\)"),
        ("mobilenetv2_10", {}, r"did you mean 'mobilenetv2_1"),
        ("", {}, "timm knows no model ''"),
        ("resnet18.no_such_tag", {"pretrained": True}, "timm cannot create 'resnet18.no_such_tag': "),
        ("resnet18", {"no_such_argument": 1}, "timm cannot create 'resnet18': .*no_such_argument"),
        ("/", {}, "/ is a folder, but not of an exported model, which has a config.json"),
        ("local-dir:/nowhere", {}, "timm cannot create 'local-dir:/nowhere': "),
        ("unknown-scheme:x", {}, "timm cannot create 'unknown-scheme:x': "),
    ],
)
def test_what_timm_cannot_create_is_one_line(name: str, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        create_base(name, **arguments)
    assert "\n" not in str(caught.value)
