from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from families import base
from torch import Tensor, nn

import nas_kd.models  # noqa: F401  registers the models
from nas_kd.budget import Cost
from nas_kd.costs.cost_table import cost_table
from nas_kd.costs.verification import analyse, measure
from nas_kd.errors import CheckpointError, ModelError
from nas_kd.genotype import Genotype
from nas_kd.results.export import export, load
from nas_kd.students.building import build_student
from nas_kd.students.inheritance import inherit_student
from nas_kd.training.checkpoint import load_checkpoint

NAMES = ["cifar_resnet20", "cifar_resnet56_cheap", "cifar_vgg16_bn"]
COUNTS = {
    "cifar_resnet20": (269_722, 40_551_040),
    "cifar_resnet32": (464_154, 68_862_592),
    "cifar_resnet44": (658_586, 97_174_144),
    "cifar_resnet56": (853_018, 125_485_696),
    "cifar_resnet110": (1_727_962, 252_887_680),
    "cifar_vgg16_bn": (14_728_266, 313_201_664),
}
CHEAP = {  # Table of arXiv 1909.13063's authors' code
    "standard": (855_770, 125_747_840),
    "depthwise": (119_818, 20_472_448),
    "shift": (102_106, 15_385_216),
    "group4": (311_194, 50_774_656),
}
DATA = Path(__file__).parents[3] / "shared" / "data"  # the real images and weights, where there are any
ACCURACIES = {20: 0.9173, 32: 0.9263, 44: 0.9310, 56: 0.9339}
needs_data = pytest.mark.skipif(not (DATA / "cifar10_test.npz").exists(), reason="needs the CIFAR-10 test images")


def _meta(name: str, conv: str | None = None) -> nn.Module:
    given = {} if conv is None else {"conv": conv}
    with torch.device("meta"):
        network: nn.Module = timm.create_model(name, **given).eval()
    return network


@pytest.mark.parametrize(("name", "counts"), COUNTS.items())
def test_counts(name: str, counts: tuple[int, int]) -> None:
    expected = Cost(params=counts[0], macs=counts[1])
    assert measure(_meta(name), (3, 32, 32)) == expected
    if name != "cifar_resnet110":
        assert base(name, 32).table.base() == expected


@pytest.mark.parametrize(("conv", "counts"), CHEAP.items())
def test_the_papers_counts_come_out_of_the_built_network(conv: str, counts: tuple[int, int]) -> None:
    assert measure(_meta("cifar_resnet56_cheap", conv), (3, 32, 32)) == Cost(params=counts[0], macs=counts[1])


@pytest.mark.parametrize("conv", ["standard", "depthwise", "group4"])
def test_the_papers_counts_come_out_of_the_closed_form(conv: str) -> None:
    network = _meta("cifar_resnet56_cheap", conv)
    table = cost_table(analyse(network, (3, 32, 32)), network)
    assert table.base() == Cost(params=CHEAP[conv][0], macs=CHEAP[conv][1])


@pytest.mark.parametrize("conv", CHEAP)
def test_choices_of_the_standard_form_count_as_the_paper_does(conv: str) -> None:
    """Parameters to the unit; MACs are fewer, since our strided cheap convolutions stride in their spatial part."""
    subject = base("cifar_resnet56_cheap", 32)
    chosen = {b.name: next(c for c in b.choices if c.conv == conv and c.width == 1) for b in subject.table.blocks}
    cost = subject.table.cost(chosen)
    assert cost.params == CHEAP[conv][0]
    student = build_student(subject.network, subject.analysis, Genotype.of(chosen))
    assert measure(student, (3, 32, 32)) == cost
    assert cost.macs == CHEAP[conv][1] if conv == "standard" else cost.macs < CHEAP[conv][1]


def test_the_papers_shifts_are_a_genotype_of_its_depthwise_form() -> None:
    """Both stride in the second 1×1, so that the shifts run where the paper has them."""
    network = _meta("cifar_resnet56_cheap", "depthwise")
    analysis = analyse(network, (3, 32, 32))
    table = cost_table(analysis, network)
    default = {block.name: block.default for block in table.blocks}
    shifts = Genotype.of({name: dataclasses.replace(choice, conv="shift") for name, choice in default.items()})
    expected = Cost(params=CHEAP["shift"][0], macs=CHEAP["shift"][1])
    assert len(shifts) == 27
    assert table.cost(shifts) == expected
    assert measure(build_student(network, analysis, shifts), (3, 32, 32)) == expected


def test_a_base_of_shifts_alone_is_refused() -> None:
    network = _meta("cifar_resnet56_cheap", "shift")
    with pytest.raises(ModelError, match="its shifts keep their channels: search a base with depthwise convolutions"):
        analyse(network, (3, 32, 32))


@pytest.mark.parametrize("name", NAMES)
def test_timm_treats_it_as_one_of_its_own(name: str) -> None:
    network = timm.create_model(name, num_classes=7, drop_rate=0.2)
    image = torch.randn(2, 3, 32, 32)
    assert network.pretrained_cfg["input_size"] == (3, 32, 32)
    assert network.get_submodule(network.pretrained_cfg["first_conv"]).in_channels == 3
    assert network.get_submodule(network.pretrained_cfg["classifier"]) is network.get_classifier()
    assert timm.create_model(name, in_chans=1)(image[:, :1]).shape == (2, 10)
    assert network(image).shape == (2, 7)
    features = network.eval().forward_features(image)
    pre_logits = network.forward_head(features, pre_logits=True)
    assert (features.shape[1], pre_logits.shape[1]) == (network.num_features, network.head_hidden_size)
    assert torch.equal(network.get_classifier()(pre_logits), network(image))
    network.reset_classifier(0)
    assert torch.equal(network(image), pre_logits)
    assert timm.create_model(name, num_classes=0, global_pool="")(image).ndim == 4
    grouped = timm.models.group_parameters(network, network.group_matcher())
    assert sum(map(len, grouped.values())) == len(list(network.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_features(name: str) -> None:
    network = timm.create_model(name, features_only=True)
    maps = network(torch.randn(1, 3, 32, 32))
    assert [level.shape[1] for level in maps] == network.feature_info.channels()
    assert [32 // level.shape[2] for level in maps] == network.feature_info.reduction()
    last = timm.create_model(name, features_only=True, out_indices=(1,))
    assert len(last(torch.randn(1, 3, 32, 32))) == 1


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name).train()
    image = torch.randn(2, 3, 32, 32)
    network(image).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    network.set_grad_checkpointing()
    network(image).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in network.parameters()], expected)


@pytest.mark.parametrize(("name", "conv"), [("cifar_resnet20", None), ("cifar_resnet56_cheap", "depthwise"),
                                            ("cifar_vgg16_bn", None)])  # fmt: skip
def test_students_export(name: str, conv: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, **({} if conv is None else {"conv": conv})).eval()
    analysis = analyse(network, (3, 32, 32), name=name)
    table = cost_table(analysis, network)
    genotype = table.genotype([len(block.choices) // 2 for block in table.blocks])
    student = inherit_student(network, analysis, genotype).eval()
    again = load(export(student, tmp_path / "small")).eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(image), student(image))
    assert measure(again, (3, 32, 32)) == table.cost(genotype)
    features = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True, features_only=True)
    assert [level.shape[1] for level in features(image)] == features.feature_info.channels()


def _images(limit: int | None) -> tuple[Tensor, Tensor]:
    spec = importlib.util.spec_from_file_location("unpack", DATA / "unpack.py")
    assert spec is not None
    assert spec.loader is not None
    unpack: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    pixels, labels, _ = unpack.read(DATA / "cifar10_test.npz", limit)
    config = timm.create_model("cifar_resnet20").pretrained_cfg
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std, torch.from_numpy(labels)


def _accuracy(depth: int, limit: int | None) -> float:
    network = timm.create_model(f"cifar_resnet{depth}").eval()
    load_checkpoint(network, DATA / "weights" / f"cifar10_resnet{depth}_akamaster.safetensors")
    images, labels = _images(limit)
    with torch.no_grad():
        guesses = torch.cat([network(part).argmax(1) for part in images.split(250)])
    return (guesses == labels).double().mean().item()


@needs_data
def test_public_weights_score_on_the_first_images() -> None:
    assert _accuracy(20, 1000) == pytest.approx(0.919, abs=0.002)  # two images may be near a tie


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("depth", ACCURACIES)
def test_public_weights_score_what_was_measured(depth: int) -> None:
    assert _accuracy(depth, None) == pytest.approx(ACCURACIES[depth], abs=1e-4)


@needs_data
def test_public_weights_of_another_depth_are_refused() -> None:
    network = timm.create_model("cifar_resnet32")
    with pytest.raises(CheckpointError, match="it lacks layer1"):
        load_checkpoint(network, DATA / "weights" / "cifar10_resnet20_akamaster.safetensors")
