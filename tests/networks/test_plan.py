from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, FEW, family
from hypothesis import given
from hypothesis import strategies as st

from nas_kd.errors import PlanError
from nas_kd.networks.convolutions import ConvSpec
from nas_kd.networks.plan import SETTABLE, Edit, Plan, apply_plan, resize
from nas_kd.students.building import student_plan

WHOLE = st.integers(1, 512)
NAMES = st.sampled_from(["weight", "bias", "running_mean", "gamma"])
SPECS = st.builds(
    ConvSpec,
    kind=st.sampled_from(["standard", "depthwise", "blueprint", "shift"]),
    in_channels=WHOLE,
    out_channels=WHOLE,
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    stride=st.integers(1, 2),
    padding=st.sampled_from(["same", 0, 1, 3]),
    bias=st.booleans(),
)
EDITS = st.one_of(
    st.builds(Edit, conv=SPECS),
    st.just(Edit(drop=True)),
    st.builds(
        Edit,
        shapes=st.dictionaries(
            NAMES, st.dictionaries(st.integers(0, 3), WHOLE, min_size=1).map(lambda d: (*d.items(),))
        ),
        sizes=st.dictionaries(st.sampled_from(sorted(SETTABLE)), st.one_of(WHOLE, st.tuples(WHOLE, WHOLE)), min_size=1),
    ),
)
PLANS = st.builds(
    Plan,
    edits=st.dictionaries(st.text("abc.01", max_size=8), EDITS, max_size=5),
    features=st.lists(WHOLE).map(tuple),
)


@FEW
@given(plan=PLANS)
def test_json_round_trip(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("name", FAMILIES)
def test_json_round_trip_of_real_plans(name: str) -> None:
    subject = family(name)
    plan = student_plan(subject.network, subject.analysis, subject.genotype(0))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_two_plans_in_a_row() -> None:
    first = Plan(edits={"conv1": Edit(sizes={"stride": (1, 1)}), "a": Edit(drop=True)}, features=(1, 2))
    second = Plan(edits={"conv1": Edit(shapes={"weight": ((0, 8),)}), "b": Edit(sizes={"out_channels": 8})})
    both = first.then(second)
    assert both.edits["conv1"] == Edit(sizes={"stride": (1, 1)}, shapes={"weight": ((0, 8),)})
    assert both.edits.keys() == {"conv1", "a", "b"}
    assert both.features == (1, 2)


def _plan_data() -> dict[str, Any]:
    subject = family("resnet18")
    data: dict[str, Any] = student_plan(subject.network, subject.analysis, subject.genotype(0)).to_json()
    return copy.deepcopy(data)


def _conv(data: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = next(edit["conv"] for edit in data["edits"].values() if "conv" in edit)
    return spec


def _shapes(data: dict[str, Any]) -> dict[str, Any]:
    shapes: dict[str, Any] = next(edit["shapes"] for edit in data["edits"].values() if "shapes" in edit)
    return shapes


def _sizes(data: dict[str, Any]) -> dict[str, Any]:
    sizes: dict[str, Any] = next(edit["sizes"] for edit in data["edits"].values() if "sizes" in edit)
    return sizes


MANGLED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda data: data.pop("version"), "the plan is damaged .*version.*: export the model again"),
    (lambda data: data.update(version=99), "has version 99, this nas_kd reads up to 1: update it"),
    (lambda data: data.pop("edits"), "the plan is damaged"),
    (lambda data: data.update(edits=[1, 2]), "the plan is damaged"),
    (lambda data: data.update(features=["many"]), "the plan is damaged"),
    (lambda data: _conv(data).update(kind="magic"), "not a convolution"),
    (lambda data: _conv(data).update(in_channels=0), "not a convolution"),
    (lambda data: _conv(data).update(extra=1), "the plan is damaged"),
    (lambda data: _shapes(data).update(weight={"0": 0}), "makes a tensor empty"),
    (lambda data: _shapes(data).update(weight={"0": -3}), "holds -3 where a whole number belongs"),
    (lambda data: _shapes(data).update(weight={"zero": 3}), "the plan is damaged"),
    (lambda data: _sizes(data).update(forward=1), "sets 'forward', which is no size of a module"),
    (lambda data: _sizes(data).update(__class__=1), "sets '__class__', which is no size of a module"),
    (lambda data: _sizes(data).update(in_channels=1.5), "holds 1.5 where a whole number belongs"),
    (lambda data: _sizes(data).update(in_channels=True), "holds True where a whole number belongs"),
]


@pytest.mark.parametrize(("mangle", "message"), MANGLED)
def test_damage_is_told(mangle: Callable[[dict[str, Any]], object], message: str) -> None:
    data = _plan_data()
    mangle(data)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(data)


@pytest.mark.parametrize("data", [None, [], "plan", 3, {}])
def test_something_else_is_no_plan(data: object) -> None:
    with pytest.raises(PlanError, match="the plan is damaged"):
        Plan.from_json(data)


@pytest.mark.parametrize(
    ("path", "edit", "message"),
    [
        ("layer9", Edit(drop=True), "does not fit ResNet at layer9"),
        ("layer1.7", Edit(sizes={"in_channels": 3}), r"does not fit ResNet at layer1\.7"),
        ("conv1", Edit(shapes={"gamma": ((0, 3),)}), "at conv1: Conv2d has no tensor gamma"),
        ("conv1", Edit(shapes={"bias": ((0, 3),)}), "at conv1: Conv2d has no tensor bias"),
        ("conv1", Edit(shapes={"weight": ((7, 3),)}), "does not fit ResNet at conv1"),
        ("conv1", Edit(sizes={"splits": 3}), "at conv1: Conv2d has no splits"),
        ("", Edit(sizes={"hidden_features": 3}), "at the network itself: ResNet has no hidden_features"),
    ],
)
def test_a_plan_for_another_network(path: str, edit: Edit, message: str) -> None:
    network = copy.deepcopy(family("resnet18").network)
    with pytest.raises(PlanError, match=message):
        apply_plan(network, Plan(edits={path: edit}))


def test_feature_levels_of_another_network() -> None:
    network = copy.deepcopy(family("resnet18").network)
    with pytest.raises(PlanError, match="names 2 feature levels, ResNet has others"):
        apply_plan(network, Plan(features=(1, 2)))


def test_a_plan_leaves_classes_and_images_to_the_base() -> None:
    """A student of 10 classes and RGB images rebuilt with 3 classes and grey images."""
    subject = family("resnet18")
    plan = student_plan(subject.network, subject.analysis, subject.genotype(0))
    network = apply_plan(timm.create_model("resnet18", num_classes=3, in_chans=1).eval(), plan)
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


def test_resize_keeps_the_first_and_pads_around() -> None:
    tensor = torch.arange(1.0, 7).view(2, 3)
    assert resize(tensor, ((0, 1), (1, 2))).tolist() == [[1, 2]]
    assert resize(tensor, ((1, 5),)).tolist() == [[0, 1, 2, 3, 0], [0, 4, 5, 6, 0]]
