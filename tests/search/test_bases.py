"""Bases as people bring them, each through a space, a step of training, an export and a load."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import timm
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

import nas_kd
from nas_kd.errors import ModelError
from nas_kd.genotype import Genotype

SIDE = 32
Change = Callable[[Any], Any]  # of a base or student, in place or into another one
IMAGES = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def base(name: str = "test_resnet", **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **arguments)


@pytest.fixture(scope="module")
def genotype() -> Genotype:
    """A student of the common base with each kind of convolution."""
    space = nas_kd.Space(base(), img_size=SIDE)
    choices = {}
    for number, block in enumerate(space.blocks):
        kinds = ("shift", "depthwise", "standard")[number % 3 :]
        own = [c for kind in kinds for c in block.choices if c.conv == kind and c.width == block.widths[1]]
        choices[block.name] = own[0] if own else block.default
    return Genotype.of(choices)


def memory(network: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}


def two_steps(one: nn.Module, other: nn.Module, images: Tensor) -> None:
    """Both run, one learns, and then the other: autograd must not take them for one."""
    losses = [network(images).square().mean() for network in (one, other)]
    for network, loss in zip((one, other), losses, strict=True):
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        torch.optim.SGD(network.parameters(), lr=0.01).step()


def frozen_in_part(network: Any) -> None:
    network.layer1.requires_grad_(False)
    network.bn1.eval()


def hooked(network: Any) -> None:
    network.layer2.register_forward_hook(lambda module, images, output: pytest.fail(f"saw {output.mean().item()}"))
    network.layer3.register_forward_pre_hook(lambda module, images: pytest.fail("ran"))
    network.layer4.register_full_backward_hook(lambda module, before, after: pytest.fail("ran"))
    network.fc.weight.register_hook(lambda gradient: pytest.fail("ran"))


WRAPPED: dict[str, Change] = {
    "as it is": lambda network: None,
    "frozen": lambda network: network.requires_grad_(False),
    "frozen in part": frozen_in_part,
    "evaluated": lambda network: network.eval(),
    "channels last": lambda network: network.to(memory_format=torch.channels_last),
    "half": lambda network: network.half(),
    "bfloat16": lambda network: network.bfloat16(),
    "compiled": torch.compile,
    "compiled in place": lambda network: network.compile(),
    "DataParallel": nn.DataParallel,
    "SyncBN": nn.SyncBatchNorm.convert_sync_batchnorm,
    "all at once": lambda n: nn.DataParallel(torch.compile(nn.SyncBatchNorm.convert_sync_batchnorm(n))),
    "averaged": AveragedModel,
    "moving average": ModelEmaV3,
    "hooked": hooked,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_students_learn_alone_and_load_equal(kind: str, genotype: Genotype, tmp_path: Path) -> None:
    network = base()
    given = WRAPPED[kind](network)
    network = network if given is None else given
    space = nas_kd.Space(network, img_size=SIDE)
    one, other = space.student(genotype).train(), space.student(genotype).train()
    assert type(one) is type(base())
    images = IMAGES.to(next(one.parameters()).dtype)
    two_steps(one, other, images)
    assert not memory(one) & memory(other)
    assert not (memory(one) | memory(other)) & memory(network)
    loaded = nas_kd.load(nas_kd.export(one, tmp_path / "model")).to(images.dtype)
    one = one.eval().to(memory_format=torch.contiguous_format)  # kernels of another layout may round otherwise
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), one(images))


def test_timms_synchronised_norms_keep_their_activations(tmp_path: Path) -> None:
    network, plain = convert_sync_batchnorm(base("test_efficientnet")), base("test_efficientnet").eval()
    space = nas_kd.Space(network, img_size=SIDE)
    student = space.student(space.analysis.identity).eval()
    with torch.no_grad():
        assert torch.equal(student(IMAGES), plain(IMAGES))
        assert torch.equal(nas_kd.load(nas_kd.export(student, tmp_path / "model")).eval()(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("inside", [False, True], ids=["out of", "in"])
def test_students_of_inference_tensors_learn(inside: bool, genotype: Genotype) -> None:
    with torch.inference_mode():
        network = base()
    space = nas_kd.Space(network, img_size=SIDE)
    with torch.inference_mode(inside):
        students = [space.student(genotype).train() for _ in range(2)]
    two_steps(*students, IMAGES)


def test_a_hooked_base_is_told_of_and_keeps_its_hooks(caplog: pytest.LogCaptureFixture) -> None:
    network, seen = base(), []
    network.layer2.register_forward_hook(lambda module, images, output: seen.append(output.shape))
    with caplog.at_level(logging.WARNING):
        space = nas_kd.Space(network, img_size=SIDE)
    assert "ResNet has hooks (layer2): its students are made without them" in caplog.text
    assert seen == []
    space.base(IMAGES)
    assert seen == []
    network(IMAGES)
    assert len(seen) == 1
    assert memory(space.base) == memory(network)


def test_a_hook_of_all_modules_is_named() -> None:
    def look(module: nn.Module, images: Any, output: Tensor) -> None:
        output.mean().item()

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        with pytest.raises(ModelError, match=r"a hook of all modules .* may be to blame"):
            nas_kd.Space(base(), img_size=SIDE)
    finally:
        handle.remove()


def set_to(path: str, **values: Any) -> Change:
    def change(network: Any) -> None:
        for name, value in values.items():
            setattr(network.get_submodule(path), name, value)

    return change


def put(path: str, make: Callable[[], nn.Module]) -> Change:
    return lambda network: network.set_submodule(path, make())


CHANGED: dict[str, tuple[Change, str]] = {
    "activation": (put("layer1.0.act1", nn.SiLU), r"layer1\.0\.act1 is SiLU\(\), not ReLU"),
    "one more": (put("layer1.0.act1", lambda: nn.Sequential(nn.ReLU(), nn.Tanh())), "act1 is Sequential"),
    "eps": (set_to("bn1", eps=0.1), r"bn1 is BatchNorm2d\(32, eps=0\.1"),
    "padding": (set_to("layer1.0.conv1", padding_mode="reflect"), "padding_mode=reflect"),
    "stride": (set_to("layer2.0.conv1", stride=(1, 1)), r"stride=\(1, 1\)"),
    "dilation": (set_to("layer1.0.conv1", dilation=(2, 2), padding=(2, 2)), r"dilation=\(2, 2\)"),
    "pooling": (put("global_pool.pool", lambda: nn.AdaptiveMaxPool2d(1)), "AdaptiveMaxPool2d"),
    "forward": (set_to("layer1.0", forward=lambda images: images), r"layer1\.0\.forward is <function"),
    "batch statistics": (set_to("bn1", track_running_stats=False), "track_running_stats=False"),
    "classifier": (put("fc", lambda: nn.Sequential(nn.Dropout(), nn.Linear(96, 7))), "fc is Sequential"),
    "part compiled": (lambda network: network.set_submodule("layer1", torch.compile(network.layer1)), "layer1 is "),
    "part wrapped": (lambda network: network.set_submodule("layer1", nn.DataParallel(network.layer1)), "layer1 is "),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_base_that_was_changed_by_hand_is_refused_at_once(kind: str) -> None:
    network, (change, words) = base(), CHANGED[kind]
    change(network)
    with pytest.raises(ModelError, match=rf"was changed after timm created it \(.*{words}") as caught:
        nas_kd.Space(network, img_size=SIDE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "change", "words"),
    [
        ("test_resnet", {"act_layer": "leaky_relu"}, set_to("layer1.0.act1", negative_slope=0.3), "negative_slope=0.3"),
        ("mobilenetv2_050", {}, set_to("bn1.act", max_val=4.0), r"bn1\.act\.max_val is 4\.0, not 6\.0"),
        ("test_efficientnet", {}, nn.SyncBatchNorm.convert_sync_batchnorm, "is BatchNorm2d.*not BatchNormAct2d"),
    ],
)
def test_what_no_layer_says_of_itself_is_seen_too(
    name: str, arguments: dict[str, Any], change: Change, words: str
) -> None:
    network = base(name, **arguments)
    network = change(network) or network  # torch's conversion loses the activations inside timm's norms
    with pytest.raises(ModelError, match=words):
        nas_kd.Space(network, img_size=64)


@pytest.mark.parametrize(
    "change",
    [
        lambda network: [setattr(m, "inplace", False) for m in network.modules() if isinstance(m, nn.ReLU)] and None,
        lambda network: setattr(network, "fc", nn.Linear(96, 7)),
        lambda network: setattr(network, "fc", nn.Identity()),
        lambda network: network.reset_classifier(5),
        lambda network: network.set_grad_checkpointing(),
        lambda network: setattr(network, "note", "mine"),
        lambda network: (prune.l1_unstructured(network.fc, "weight", 0.5), prune.remove(network.fc, "weight")) and None,
    ],
    ids=["in place", "classifier", "no classifier", "other classes", "checkpointing", "attribute", "pruned"],
)
def test_what_exports_can_hold_is_exported_right(change: Change, tmp_path: Path) -> None:
    network = base()
    change(network)
    space = nas_kd.Space(network, img_size=SIDE)
    student = space.student(space.table.cheapest("params")).eval()
    loaded = nas_kd.load(nas_kd.export(student, tmp_path / "model")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), student(IMAGES))
    assert loaded.num_classes == student(IMAGES).shape[1] or loaded.num_classes == 0


def test_a_momentum_that_exports_do_not_keep_is_told(caplog: pytest.LogCaptureFixture) -> None:
    network = base()
    network.bn1.momentum = 0.7
    with caplog.at_level(logging.WARNING):
        nas_kd.Space(network, img_size=SIDE)
    assert "exports do not keep momentum=0.7 of bn1: it is 0.1 in what they load" in caplog.text


def conv_of(network: Any) -> nn.Module:
    conv: nn.Module = network.layer2[0].conv1
    return conv


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: weight_norm(conv_of(n)), r"layer2\.0\.conv1 \(WeightNorm\): .*remove_weight_norm"),
        (lambda n: spectral_norm(conv_of(n)), r"layer2\.0\.conv1 \(SpectralNorm\): .*remove_spectral_norm"),
        (lambda n: parametrizations.weight_norm(conv_of(n)), "parametrized.*remove_parametrizations"),
        (lambda n: parametrizations.orthogonal(n.fc), r"fc \(parametrized\)"),
        (lambda n: prune.random_unstructured(conv_of(n), "weight", 0.5), "pruned.*torch.nn.utils.prune.remove"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of the older ones
def test_recomputed_weights_are_refused_with_the_way_out(change: Change, words: str) -> None:
    network = base()
    change(network)
    for give in (lambda: nas_kd.Space(network, img_size=SIDE), lambda: nas_kd.analyse(network, (3, SIDE, SIDE))):
        with pytest.raises(ModelError, match=words):
            give()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: base(features_only=True), "features_only=True, which has no classifier"),
        (lambda: base("test_efficientnet", features_only=True), "features_only=True, which has no classifier"),
        (lambda: base(act_layer=functools.partial(nn.LeakyReLU, 0.3)), "act_layer=.*, which no export can hold"),
        (lambda: base(act_layer=type("Own", (nn.ReLU,), {})), "act_layer=.*, which no export can hold"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), "does not know the size of 0.weight yet"),
    ],
)
def test_what_has_no_exports_is_refused_at_once(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        nas_kd.Space(make(), img_size=SIDE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_resnet", {"act_layer": nn.LeakyReLU}),
        ("test_resnet", {"act_layer": nn.Hardswish, "norm_layer": nn.BatchNorm2d}),
        ("test_efficientnet", {"act_layer": nn.SiLU}),
    ],
)
def test_layers_given_as_classes_are_exported_by_name(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    space = nas_kd.Space(base(name, **arguments), img_size=SIDE)
    student = space.student(space.table.cheapest("params")).eval()
    loaded = nas_kd.load(nas_kd.export(student, tmp_path / "model")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), student(IMAGES))


def test_a_network_that_is_not_timms_is_told_that_nothing_can_be_exported(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    with caplog.at_level(logging.WARNING):
        nas_kd.Space(network, img_size=SIDE)
    assert "Sequential is no model of timm.create_model: its students can be trained, but not exported" in caplog.text


@pytest.mark.parametrize("library", [False, True])
def test_trials_in_threads_are_independent(library: bool, tmp_path: Path) -> None:
    """The user's own study with `n_jobs=2`: each trains two students in turn with the other thread."""
    network = base()
    options = nas_kd.parse_options("width=1/0.5,conv=standard/shift")
    space = nas_kd.Space(network, budget="params=60%", img_size=SIDE, options=options)
    if library:
        pixels = (IMAGES.repeat(4, 1, 1, 1).clamp(0, 1) * 255).byte()
        images = nas_kd.Images(pixels, torch.arange(16) % 10, (0.5,) * 3, (0.5,) * 3)
        spec = nas_kd.LibrarySpec(images=8, holdout=8, rounds=())
        space = space.with_library(nas_kd.build_library(space.base, space.analysis, images, spec, tmp_path))
    before = copy.deepcopy(network.state_dict())  # a library may have anchored its norms

    def objective(trial: optuna.Trial) -> float:
        student, twin = space.suggest(trial).train(), space.student(trial).train()
        two_steps(student, twin, IMAGES)
        return student(IMAGES).square().mean().item()

    study = optuna.create_study(sampler=nas_kd.KnapsackSampler(space, seed=0))
    study.optimize(objective, n_trials=6, n_jobs=2)
    assert {trial.state for trial in study.trials} <= {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
