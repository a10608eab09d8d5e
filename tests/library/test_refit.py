"""Least-squares fits against numpy, and what they are worth on real blocks."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import nas_kd.models  # noqa: F401  # registers the CIFAR bases
from nas_kd.analysis.structure import Analysis
from nas_kd.costs.verification import analyse
from nas_kd.genotype import Choice
from nas_kd.library import importance
from nas_kd.library.importance import Reader, eliminate, reconstruction_importance
from nas_kd.library.refit import batch_statistics, fit_layer, reference_of, refit
from nas_kd.students.frames import (
    Recording,
    disjoint,
    find_frames,
    join_batches,
    recording,
    replaying,
    run_frame,
    swapped,
    with_skips,
)
from nas_kd.students.inheritance import inherit_student
from nas_kd.students.unit_importance import unit_importance


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model("cifar_resnet20")
    network.train()
    with torch.no_grad():  # statistics of its own activations
        for _ in range(30):
            network(torch.randn(32, 3, 32, 32))
    return network.eval()


@pytest.fixture(scope="module")
def analysis(base: nn.Module) -> Analysis:
    return analyse(base, (3, 32, 32))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def recordings_of(base: nn.Module, frames: dict, images: Tensor) -> dict[str, Recording]:  # type: ignore[type-arg]
    with torch.no_grad(), recording(base, frames) as recordings:
        for part in images.split(16):
            base(part)
    return {name: join_batches(parts) for name, parts in recordings.items()}


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 1), nn.Conv2d(3, 4, 3, padding=1, stride=2)])
def test_a_fit_is_the_least_squares_solution(layer: nn.Linear | nn.Conv2d) -> None:
    torch.manual_seed(0)
    truth = type(layer)(**_arguments(layer))
    x = torch.randn(4096, 6) if isinstance(layer, nn.Linear) else torch.randn(40, layer.in_channels, 16, 16) + 1
    target = truth(x) + 0.01
    with torch.no_grad():
        fit_layer(layer, x, target, centred=True)
    assert (layer(x) - target).square().mean() < 1e-4 * target.var()  # the ridge is what is left


def _arguments(layer: nn.Linear | nn.Conv2d) -> dict[str, object]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "padding": layer.padding,
        "stride": layer.stride,
    }


def test_a_depthwise_fit_is_one_regression_per_channel() -> None:
    torch.manual_seed(0)
    truth, layer = (nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False) for _ in range(2))
    x = torch.randn(64, 5, 12, 12)
    with torch.no_grad():
        fit_layer(layer, x, truth(x), centred=False)
    assert torch.allclose(layer.weight, truth.weight, atol=1e-2)


def test_a_fit_with_few_samples_is_the_ridge_solution() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(50, 3, bias=False)
    start = layer.weight.detach().clone()
    x, y = torch.randn(20, 50), torch.randn(20, 3)
    with torch.no_grad():
        fit_layer(layer, x, y, centred=False)
    ridge = (1e-3 + 0.02 * 50 / 20) * float((x @ x.T).trace()) / 50
    rows = torch.cat([x, ridge**0.5 * torch.eye(50)]).double().numpy()
    wanted = torch.cat([y - x @ start.T, torch.zeros(50, 3)]).double().numpy()
    oracle = start.double().numpy() + np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    assert np.allclose(layer.weight.detach().numpy(), oracle, atol=1e-4)


def test_an_elimination_drops_the_least_missed_channel_first() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 6)) @ rng.normal(size=(6, 6))
    weight = rng.normal(size=(4, 6))
    steps = eliminate([_reader(x, weight)], np.arange(6))

    def loss(dropped: set[int]) -> float:
        kept = [column for column in range(6) if column not in dropped]
        gap = x @ weight.T
        return float(((gap - x[:, kept] @ np.linalg.lstsq(x[:, kept], gap, rcond=None)[0]) ** 2).sum())

    dropped: set[int] = set()
    for step in range(5):  # brute force: the one whose loss hurts least after a fit of the others
        best = min(set(range(6)) - dropped, key=lambda channel: loss(dropped | {channel}))
        assert steps[best] == step
        dropped.add(best)


def _reader(x: np.ndarray, weight: np.ndarray) -> Reader:  # type: ignore[type-arg]
    covariance = torch.from_numpy(x.T @ x / len(x))
    return Reader(
        weight=torch.from_numpy(weight).clone(),
        inverse=torch.linalg.inv(covariance),
        labels=np.arange(x.shape[1]),
        energy=1.0,
    )


def test_two_layers_that_read_the_same_channels_both_count() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3))
    first, second = np.array([[1.0, 0.0, 0.1]]), np.array([[0.0, 1.0, 0.1]])
    steps = eliminate([_reader(x, first), _reader(x, second)], np.arange(3))
    assert steps[2] == 0  # little to each of them


def test_copies_of_a_channel_are_eliminated_before_single_ones() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 4))
    x[:, 3] = x[:, 0] + 0.01 * rng.normal(size=4000)  # large, but another one says the same
    steps = eliminate([_reader(x, np.array([[2.0, 0.3, 0.3, 2.0]]))], np.arange(4))
    assert min(steps[0], steps[3]) == 0


def test_matrices_that_are_cut_on_the_way_change_no_elimination(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(4000, 60)) @ rng.normal(size=(60, 60)), rng.normal(size=(4, 60))
    labels = rng.permutation(60)[:40]  # the layer reads others, which stay
    steps = eliminate([_reader(x, weight)], labels)
    monkeypatch.setattr(importance, "_CUT", 1.0)
    assert np.array_equal(eliminate([_reader(x, weight)], labels), steps)


@pytest.mark.parametrize("choice", [{"width": 0.5}, {"conv": "group4"}, {"conv": "depthwise"}, {"conv": "blueprint"}])
def test_a_refit_brings_a_block_closer_to_the_base(
    base: nn.Module, analysis: Analysis, images: Tensor, choice: dict[str, object]
) -> None:
    frames = find_frames(base, analysis, images[:2])
    block = analysis.block("layer2.1")
    recorded = recordings_of(base, {block.name: frames[block.name]}, images)[block.name]
    chosen = Choice(**{"kernel_size": 3, "conv": "standard", **choice})  # type: ignore[arg-type]
    errors = []
    for fitted in (False, True):
        genotype = swapped(analysis, block, chosen)
        student = inherit_student(base, analysis, genotype)
        mask = analysis.keep_mask(genotype, unit_importance(base, analysis))
        if fitted:
            refit(student, mask, reference_of(base, analysis, frames[block.name], recorded))
        module = frames[block.name].inside(student)
        with torch.no_grad(), batch_statistics(module):
            errors.append(float((run_frame(module, recorded)[0] - recorded.outputs[0]).square().mean()))
    assert errors[1] < 0.96 * errors[0]


def test_reconstruction_ranks_every_channel_of_a_width(base: nn.Module, analysis: Analysis, images: Tensor) -> None:
    frames = find_frames(base, analysis, images[:2])
    order = reconstruction_importance(base, analysis, frames, recordings_of(base, frames, images))
    for block in analysis.blocks:
        (segment,) = block.channels[0].segments
        assert sorted(order[segment]) == list(range(len(segment)))


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg16_bn", "mobilenetv2_035", "selecsls42"])
def test_every_choice_keeps_the_shape_of_its_frame(name: str) -> None:
    size = (3, 64, 64) if name == "selecsls42" else (3, 32, 32)
    network = timm.create_model(name, num_classes=5).eval()
    found = analyse(network, size)
    images = torch.randn(2, *size)
    frames = find_frames(network, found, images)
    chosen = {block.name: frames[block.name] for block in found.blocks[:: max(1, len(found.blocks) // 4)]}
    recordings = recordings_of(network, chosen, images)
    for block in found.blocks:
        if block.name in chosen:
            narrowest = min(block.choices, key=lambda choice: choice.width)
            student = inherit_student(network, found, swapped(found, block, narrowest)).eval()
            with torch.no_grad():
                outputs = run_frame(chosen[block.name].inside(student), recordings[block.name])
            assert [o.shape for o in outputs] == [o.shape for o in recordings[block.name].outputs]


def test_replayed_frames_do_not_run(base: nn.Module, analysis: Analysis, images: Tensor) -> None:
    frames = find_frames(base, analysis, images[:2])
    recordings = recordings_of(base, frames, images)
    early = disjoint([frames["layer1.0"], frames["layer1.1"]])
    outputs = {frame: recordings[name].outputs for name, frame in frames.items() if frame in early}
    ran = []
    handle = base.get_submodule("layer1.0.conv1").register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        expected = base(images)
        ran.clear()
        with replaying(base, outputs):
            got = base(images)
        handle.remove()
        assert not ran
        assert torch.allclose(got, expected, atol=1e-5)
        assert torch.equal(base(images), expected)  # nothing is left behind


def test_a_whole_network_begins_at_its_first_edited_module() -> None:
    network = timm.create_model("mobilenetv2_035", num_classes=5).eval()
    found, images = analyse(network, (3, 32, 32)), torch.randn(6, 3, 32, 32)
    frames = with_skips(network, found, find_frames(network, found, images[:2]), images[:2])
    assert not frames["conv_stem"].skips  # it comes first
    tail, block = frames["blocks.6.0"], found.block("blocks.6.0")
    assert tail.is_whole
    assert "blocks.5.1.conv_pw" not in tail.paths(network)
    recorded = recordings_of(network, {"tail": tail}, images)["tail"]
    narrowest = min(block.choices, key=lambda choice: choice.width)
    student = inherit_student(network, found, swapped(found, block, narrowest)).eval()
    ran = []
    handle = student.get_submodule("blocks.5.1.conv_pw").register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        outputs = run_frame(student, recorded[torch.tensor([4, 1])])[0]
        assert not ran
        assert torch.allclose(outputs, student(images)[[4, 1]], atol=1e-5)
    assert ran  # nothing is left behind
    handle.remove()


def test_what_needs_an_early_output_late_skips_nothing() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = ((3, 8), (8, 8), (8, 8), (8, 8))
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.Conv2d(b, 8, 3, padding=1))
                for a, b in widths
            )
            self.head, self.fc = nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            early = self.layers[0](x)
            x = self.layers[2](self.layers[1](early))
            x = self.layers[3](x) + early
            return self.fc(self.head(x).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Late().eval()
    found, images = analyse(network, (3, 16, 16)), torch.randn(4, 3, 16, 16)
    frames = with_skips(network, found, find_frames(network, found, images[:2]), images[:2])
    assert frames["layers.1"].skips
    assert not frames["head"].skips  # what `layers.0` writes is read again right before it
    whole = {name: frame for name, frame in frames.items() if frame.is_whole}
    for name, recorded in recordings_of(network, whole, images).items():
        assert torch.allclose(run_frame(network, recorded)[0], recorded.outputs[0], atol=1e-5), name
