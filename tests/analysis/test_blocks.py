from __future__ import annotations

import itertools

import pytest
import timm
import torch
from families import COVERED, FAMILIES, base, family, kinds
from torch import nn

from nas_kd.analysis.blocks import WIDTHS, block_of
from nas_kd.analysis.trace import trace
from nas_kd.costs.verification import analyse, measure
from nas_kd.errors import GenotypeError, ModelError
from nas_kd.genotype import Choice
from nas_kd.students.building import build_student


@pytest.mark.parametrize(
    ("name", "path", "block"),
    [
        ("resnet18", "layer1.0.conv1", "layer1.0"),
        ("resnet18", "layer2.0.downsample.0", "layer2.0"),
        ("resnet18", "conv1", "conv1"),
        ("resnet18", "fc", "fc"),
        ("mobilenetv2_100", "blocks.2.1.conv_dw", "blocks.2.1"),
        ("mobilenetv3_small_100", "blocks.0.0.se.conv_reduce", "blocks.0.0"),
        ("vgg11_bn", "features.8", "features.8"),
        ("convnext_atto", "stages.1.blocks.0.mlp.fc1", "stages.1.blocks.0"),
        ("inception_v3", "Mixed_5b.branch1x1.conv", "Mixed_5b"),
        ("regnety_004", "s2.b1.conv2.conv", "s2.b1"),
    ],
)
def test_block_names(name: str, path: str, block: str) -> None:
    assert block_of(family(name).network, path) == block


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_offers_choices(name: str) -> None:
    analysis = family(name).analysis
    convs = {call.module for call in analysis.trace.calls if call.kind == "conv"}
    with_convs = {block_of(family(name).network, module) for module in convs}
    open_ = [block for block in analysis.blocks if len(block.choices) > 1]
    assert len(open_) > len(with_convs) / 2
    assert all(reason for _, reason in analysis.left_alone)
    assert not [reason for _, reason in analysis.left_alone if "stays" in reason]  # no student failed


@pytest.mark.parametrize("name", FAMILIES)
def test_choices_are_distinct_and_begin_with_the_base(name: str) -> None:
    for block in family(name).analysis.blocks:
        assert len(set(block.choices)) == len(block.choices)
        assert block.default == block.choices[0]
        assert block.default.width == 1
        assert block.default.conv in (None, "standard", "depthwise")
        assert block.default.kernel_size in (None, *(site.spec.kernel_size for site in block.sites))
        assert set(block.widths) <= set(WIDTHS)


def test_resnet18_as_a_whole() -> None:
    blocks = family("resnet18").analysis.blocks
    assert [block.name for block in blocks] == [f"layer{stage}.{index}" for stage in range(1, 5) for index in range(2)]
    assert blocks[0].widths == WIDTHS
    assert blocks[0].kernels == (3, 5)
    assert blocks[0].convs == ("standard", "depthwise", "blueprint", "group4", "shift")
    assert len(blocks[0].choices) == 6 * 2 * 5


def test_depthwise_bases_offer_shift() -> None:
    block = family("mobilenetv2_100").analysis.block("blocks.2.1")
    assert block.convs == ("depthwise", "shift")
    assert block.kernels == (3, 5)


def test_grouped_widths_are_whole_groups() -> None:
    for block in family("resnext50_32x4d").analysis.blocks:
        for channels in block.channels:
            if channels.size > 1:
                assert all(count * channels.size % 4 == 0 for w in block.widths for count in channels.kept(w))


def test_widths_are_rounded_but_never_nothing() -> None:
    for name in ("resnet50", "mobilenetv3_small_100", "ghostnet_100"):
        for block in family(name).analysis.blocks:
            for channels in block.channels:
                for width in block.widths:
                    counts = channels.kept(width)
                    assert all(count > 0 for count in counts)
                    if sum(counts) * channels.size >= 32:
                        assert all(count * channels.size % 8 == 0 for count in counts) or width == 1


@pytest.mark.parametrize(
    ("open_", "widths", "kernels", "convs"),
    [
        (("width",), 6, 1, 1),
        (("kernel",), 1, 2, 1),
        (("conv",), 1, 1, 5),
        (("width", "conv"), 6, 1, 5),
    ],
)
def test_aspects_can_be_closed(open_: tuple[str, ...], widths: int, kernels: int, convs: int) -> None:
    block = analyse(family("resnet18").network, (3, 32, 32), open=open_).blocks[0]
    assert (len(block.widths), len(block.convs or (1,))) == (widths, convs)
    assert max(1, len(block.kernels)) == kernels
    assert len(block.choices) == widths * kernels * convs


def test_streams_are_blocks_of_their_own() -> None:
    analysis = base("resnet18", 32, opened=("stages",)).analysis
    assert [block.name for block in analysis.blocks] == [f"layer{stage}.stream" for stage in range(1, 5)]
    assert analysis.blocks[0].channels[0].producers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert not analysis.blocks[0].sites


def test_blocks_around_an_identity_may_be_dropped() -> None:
    subject = base("resnet18", 32, opened=("keep",))
    assert [block.name for block in subject.analysis.blocks] == [
        "layer1.0",
        "layer1.1",
        "layer2.1",
        "layer3.1",
        "layer4.1",
    ]
    dropped = {block.name: block.choices[-1] for block in subject.analysis.blocks}
    assert not any(choice.keep for choice in dropped.values())
    student = build_student(subject.network, subject.analysis, dropped)
    assert isinstance(student.layer1[1], nn.Identity)
    assert len(student.layer2) == 2  # indices stay: the keys of other blocks do not move


def test_unknown_block() -> None:
    with pytest.raises(GenotypeError, match=r"resnet18 has no block 'layer1\.9'; did you mean 'layer1\.\d'\?; it has"):
        family("resnet18").analysis.block("layer1.9")


def test_a_genotype_must_be_complete() -> None:
    analysis = family("resnet18").analysis
    analysis.check(analysis.identity)
    with pytest.raises(GenotypeError, match=r"lacks block 'layer1\.0'"):
        analysis.check({})
    with pytest.raises(GenotypeError, match="is not open to block"):
        analysis.check({**analysis.identity, "layer1.0": Choice(kernel_size=7, conv="standard")})


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_transformers_and_mlps_are_refused(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    with pytest.raises(ModelError, match=r"transformer or MLP, or not supported|no spatial convolutions"):
        analyse(network, (3, 224, 224), name=name)


def test_no_convolution_at_all() -> None:
    with pytest.raises(ModelError, match="mlp has no spatial convolutions: only convolutional networks"):
        analyse(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2), name="mlp")


def test_images_too_small_for_the_model() -> None:
    with torch.device("meta"):
        network = timm.create_model("inception_v3")
    with pytest.raises(ModelError, match=r"cannot run on 3×8×8 images: .*; try a larger --img-size"):
        analyse(network, (3, 8, 8))


def test_unknown_aspect() -> None:
    with pytest.raises(ModelError, match="cannot open depth: use width, kernel, conv, stages, keep"):
        analyse(family("resnet18").network, (3, 32, 32), open=("depth",))


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERED)
def test_covered(name: str) -> None:
    """Every covered model at its own size, far from the limit of time, with choices in most blocks, and 20 random
    students as priced."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=10).eval()
    size, looks = network.pretrained_cfg["input_size"], itertools.count()
    trace(network, size, clock=lambda: 0.0 * next(looks))
    assert next(looks) < 5000  # one before each operator, of a millisecond or less
    subject = base(name, size[-1])
    assert [reason for _, reason in subject.analysis.left_alone if "stays" in reason] == []
    for seed in range(20):
        genotype = subject.genotype(seed)
        student = build_student(subject.network, subject.analysis, genotype)
        assert kinds(measure(student, subject.input_size)) == kinds(subject.table.cost(genotype))
