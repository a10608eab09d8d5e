from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from nas_kd.analysis.structure import Analysis
from nas_kd.errors import GenotypeError
from nas_kd.search.options import Options, Pin, parse_options, restrict
from nas_kd.search.space import Space


@pytest.fixture(scope="module")
def analysis(resnet: Space[nn.Module]) -> Analysis:
    return resnet.analysis


def test_everything_is_open_by_default(analysis: Analysis) -> None:
    assert parse_options() == Options()
    assert [block.choices for block in restrict(analysis, Options()).blocks] == [b.choices for b in analysis.blocks]


def test_what_is_written_is_read() -> None:
    options = parse_options(" width=0.5/1, conv=standard/group4 ", ["layer1.*:kernel=3/5", "conv1:width=0.5"])
    assert options.open == {"width": (0.5, 1.0), "conv": ("standard", "group4")}
    assert options.pins == (
        Pin("layer1.*", "kernel", (3, 5), "layer1.*:kernel=3/5"),
        Pin("conv1", "width", (0.5,), "conv1:width=0.5"),
    )


@pytest.mark.parametrize(
    ("space", "pins", "words"),
    [
        ("", (), "the space is empty: open at least one of width, kernel, conv"),
        (" , ", (), "the space is empty"),
        ("widht", (), r"unknown dimension 'widht'.*did you mean 'width'"),
        ("width=half", (), r"cannot read the width 'half'"),
        ("kernel=3.5", (), r"cannot read the kernel '3.5'"),
        ("conv=dense", (), r"unknown conv 'dense': use standard"),
        ("conv=group1", (), r"unknown conv 'group1'"),
        ("width", ("layer1",), r"cannot read the pin 'layer1': write it like 'layer1\.\*:conv=standard'"),
        ("width", (":conv=standard",), "cannot read the pin"),
        ("width", ("layer1.*:conv=",), "cannot read the pin"),
        ("width", ("layer1.*:depth=2",), "unknown dimension 'depth'"),
    ],
)
def test_what_cannot_be_read_is_refused(space: str, pins: tuple[str, ...], words: str) -> None:
    with pytest.raises(GenotypeError, match=words) as caught:
        parse_options(space, pins)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dimension", ["width", "kernel", "conv"])
def test_a_closed_dimension_stays_as_in_the_base(analysis: Analysis, dimension: str) -> None:
    opened = ",".join({"width", "kernel", "conv"} - {dimension})
    field = {"kernel": "kernel_size"}.get(dimension, dimension)
    for before, after in zip(analysis.blocks, restrict(analysis, parse_options(opened)).blocks, strict=True):
        assert {getattr(choice, field) for choice in after.choices} == {getattr(before.default, field)}
        assert after.default == before.default


def test_values_limit_every_block_that_has_them(analysis: Analysis) -> None:
    limited = restrict(analysis, parse_options("kernel=5,conv=shift/group4"))
    for before, after in zip(analysis.blocks, limited.blocks, strict=True):
        assert set(after.kernels) == ({5} if 5 in before.kernels else set(before.kernels))
        assert set(after.convs) <= {"shift", "group4"} or set(after.convs) == {before.default.conv}
        assert after.widths == (1.0,)


def test_a_pin_limits_its_blocks_alone_and_opens_what_is_closed(analysis: Analysis) -> None:
    pinned = restrict(analysis, parse_options("width", ["layer1.*:conv=shift", "layer1.*:width=0.5/1"]))
    for before, after in zip(analysis.blocks, pinned.blocks, strict=True):
        if after.name.startswith("layer1."):
            assert (after.convs, set(after.widths)) == (("shift",), {0.5, 1.0})
        else:
            assert (after.convs, after.widths) == ((before.default.conv,), before.widths)


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        (["layer9:conv=standard"], r"'layer9:conv=standard' fits no block.*blocks are layer1.0, "),
        (["layer1.*:width=0.4"], r"'layer1.\*:width=0.4' leave nothing of block layer1.0: its width can be 1.0, "),
        (["layer1.*:conv=shift", "*.0:conv=standard"], r"'.*shift' and '.*standard' leave nothing of block layer1.0"),
    ],
)
def test_a_pin_that_leaves_nothing_is_refused(analysis: Analysis, pins: list[str], words: str) -> None:
    with pytest.raises(GenotypeError, match=words):
        restrict(analysis, parse_options("width,kernel,conv", pins))


def test_a_space_offers_what_its_options_leave() -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10)
    space = Space(network, img_size=32, options=parse_options("width", ["layer1.0:width=1"]))
    assert all(name.endswith(".width") for name in space.distributions)
    assert "layer1.0.width" not in space.distributions


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("width=0", r"no block of \w+ offers width=0\.0: use 1\.0, 0\.75"),
        ("width=0.5/nan", "offers width=nan"),
        ("width=-1", r"offers width=-1\.0"),
        ("kernel=4", "offers kernel=4: use 3"),
        ("conv=group3", "offers conv=group3: use standard"),
        ("keep=no", "offers keep=False"),
    ],
)
def test_a_value_that_no_block_offers_is_refused(analysis: Analysis, space: str, words: str) -> None:
    with pytest.raises(GenotypeError, match=words):
        restrict(analysis, parse_options(space))


@pytest.mark.parametrize("multiple", [4, 16, 32])
def test_what_stays_of_many_channels_is_the_multiple_that_is_asked_for(multiple: int) -> None:
    base = timm.create_model("mobilenetv2_100", num_classes=10).eval()
    space = Space(base, img_size=32, options=parse_options("width", channel_multiple=multiple))
    many = [(b, c) for b in space.blocks for c in b.channels if sum(c.kept(1.0)) * c.size >= 4 * multiple]
    kept = {count * c.size for block, c in many for width in block.widths[1:] for count in c.kept(width)}
    assert all(count % multiple == 0 for count in kept)
    assert any(count % (2 * multiple) for count in kept)
    student = space.student(space.table.cheapest("macs"))
    assert sum(p.numel() for p in student.parameters()) == space.cost(space.table.cheapest("macs")).params
