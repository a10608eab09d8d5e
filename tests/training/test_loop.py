from __future__ import annotations

import itertools
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Batch, Images
from nas_kd.data.splits import Splits
from nas_kd.errors import DataError, TrainingError
from nas_kd.training import resume
from nas_kd.training.evaluation import equal_split, evaluate, even_split, predict_logits, recalibrate
from nas_kd.training.loop import Run, train
from nas_kd.training.recipe import Recipe

MakeNetwork = Callable[..., nn.Module]
PLAIN = Recipe(epochs=2, batch_size=32, lr=0.02, distill_weight=0)


@pytest.fixture
def data(digits: Splits) -> AugmentedImages:
    return AugmentedImages(digits.train, Augmentation(flip=False))


def weights(network: nn.Module) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in network.state_dict().values()])


def test_it_learns(make_network: MakeNetwork, data: AugmentedImages, digits: Splits) -> None:
    network, heard = make_network(), []
    result = train(
        network,
        data,
        Recipe(epochs=8, batch_size=16, lr=0.05, distill_weight=0, eval_epochs=(1, 4)),
        val=digits.val,
        report=lambda epoch, accuracy: heard.append((epoch, accuracy)),
    )
    assert result.losses[-1] < 0.6 * result.losses[0]
    assert result.accuracy > 0.3
    assert result.accuracies == tuple(heard)
    assert [epoch for epoch, _ in heard] == [1, 4, 8]
    assert result.images == 8 * 160
    assert not network.training


def test_the_seed_decides_the_weights(make_network: MakeNetwork, data: AugmentedImages) -> None:
    networks = [make_network() for _ in range(3)]
    for network, seed in zip(networks, (5, 5, 6), strict=True):
        torch.manual_seed(seed * 100 + len(networks))  # the caller's randomness does not matter
        train(network, data, replace(PLAIN, epochs=1, seed=seed))
    assert torch.equal(weights(networks[0]), weights(networks[1]))
    assert not torch.equal(weights(networks[0]), weights(networks[2]))


def test_the_callers_randomness_is_left_alone(network: nn.Module, data: AugmentedImages) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(network, data, replace(PLAIN, epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_a_report_that_raises_stops_the_training(network: nn.Module, data: AugmentedImages, digits: Splits) -> None:
    class Stop(Exception):
        pass

    def stop(epoch: int, accuracy: float) -> None:
        raise Stop(epoch)

    with pytest.raises(Stop, match="1"):
        train(network, data, replace(PLAIN, eval_epochs=(1,)), val=digits.val, report=stop)
    assert not network.training


def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    make_network: MakeNetwork, data: AugmentedImages, digits: Splits, tmp_path: Path
) -> None:
    recipe, run = replace(PLAIN, epochs=3, eval_epochs=(1, 2), ema=0.9), Run(checkpoint=tmp_path / "state")
    whole, killed, resumed = (make_network() for _ in range(3))
    expected = train(whole, data, recipe, val=digits.val)

    def kill(epoch: int, accuracy: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(killed, data, recipe, val=digits.val, report=kill, run=run)
    heard: list[int] = []
    result = train(resumed, data, recipe, val=digits.val, report=lambda epoch, _: heard.append(epoch), run=run)
    assert heard == [3]
    assert (result.accuracies, result.losses, result.images) == (expected.accuracies, expected.losses, expected.images)
    assert torch.equal(weights(whole), weights(resumed))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("case", ["damaged", "other recipe", "other network"])
def test_a_state_that_does_not_fit_is_not_resumed(
    make_network: MakeNetwork, data: AugmentedImages, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    recipe, run = replace(PLAIN, epochs=1), Run(checkpoint=tmp_path / "state")
    train(make_network(), data, recipe, run=run)
    if case == "damaged":
        (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:1000])
    recipe = replace(recipe, lr=0.01) if case == "other recipe" else recipe
    again, fresh = (make_network(classes=12 if case == "other network" else 10) for _ in range(2))
    with caplog.at_level(logging.WARNING):
        train(again, data, recipe, run=run)
    assert "cannot resume from" in caplog.text
    train(fresh, data, recipe)
    assert torch.equal(weights(again), weights(fresh))


def test_a_loss_that_is_not_finite_is_an_error(network: nn.Module, data: AugmentedImages) -> None:
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match=r"the loss became nan in epoch 1 of 2 .* learning rate of 0.02: lower"):
        train(network, data, PLAIN)


def test_nothing_to_train_is_an_error(network: nn.Module, data: AugmentedImages) -> None:
    with pytest.raises(TrainingError, match="nothing to train"):
        train(network.requires_grad_(False), data, PLAIN)


class SmallMemory(nn.Module):
    """A device whose memory holds only `limit` images: it fails as CUDA does."""

    def __init__(self, network: nn.Module, limit: int) -> None:
        super().__init__()
        self.network, self.limit = network, limit

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        logits: Tensor = self.network(images)
        return logits


def test_out_of_memory_halves_the_batch_and_keeps_the_gradient(
    data: AugmentedImages, caplog: pytest.LogCaptureFixture
) -> None:
    # without batch norm the accumulated gradient is the same one
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.Flatten(), nn.Linear(256, 10))
    limited = SmallMemory(nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.Flatten(), nn.Linear(256, 10)), limit=10)
    limited.network.load_state_dict(plain.state_dict())
    train(plain, data, replace(PLAIN, epochs=1))
    with caplog.at_level(logging.WARNING):
        train(limited, data, replace(PLAIN, epochs=1))
    assert "batches of 32 go on as 4 pieces" in caplog.text
    torch.testing.assert_close(weights(limited.network), weights(plain))


def test_one_image_that_does_not_fit_is_an_error(network: nn.Module, data: AugmentedImages) -> None:
    with pytest.raises(TrainingError, match="not even 2 images fit the memory of cpu"):
        train(SmallMemory(network, limit=0), data, PLAIN)


def test_amp_channels_last_adamw_and_ema_train_too(network: nn.Module, data: AugmentedImages) -> None:
    recipe = replace(PLAIN, amp=True, channels_last=True, optimizer="adamw", lr=0.002, ema=0.9, schedule="cosine")
    result = train(network, data, recipe)
    assert result.losses[1] < result.losses[0]
    assert all(parameter.is_contiguous() for parameter in network.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_dropped_out_layers_follow_the_recipes_seed(data: AugmentedImages) -> None:
    def trained() -> Tensor:
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", in_chans=1, num_classes=10, drop_rate=0.5)
        torch.manual_seed(torch.seed() % 1000)
        train(network, data, replace(PLAIN, epochs=1))
        return weights(network)

    assert torch.equal(trained(), trained())


def test_distillation_needs_the_logits(make_network: MakeNetwork, data: AugmentedImages) -> None:
    class Taught:
        """The same images with a teacher that is always sure of class 3."""

        mean, std, bytes = data.mean, data.std, data.bytes

        def __len__(self) -> int:
            return len(data)

        def to(self, device: torch.device) -> Taught:
            return self

        def batch(self, epoch: int, indices: Tensor) -> Batch:
            return replace(data.batch(epoch, indices), logits=torch.eye(10)[3].repeat(len(indices), 1) * 20)

        def batches(self, epoch: int, order: Sequence[Tensor]) -> Iterator[Batch]:
            return (self.batch(epoch, indices) for indices in order)

    recipe = Recipe(epochs=3, batch_size=16, lr=0.05, distill_weight=1, temperature=1)
    losses = set()
    for kind, options in (("kd", {}), ("dkd", {"dkd_alpha": 8.0, "dkd_beta": 0.0})):
        network = make_network()
        losses.add(train(network, Taught(), replace(recipe, distill=kind, **options)).losses[0])
        assert (predict_logits(network, data.images).argmax(1) == 3).double().mean() > (0.99 if kind == "kd" else 0.5)
    assert len(losses) == 2


def test_the_clock_is_given(network: nn.Module, data: AugmentedImages) -> None:
    ticks = itertools.count(start=0, step=7)
    assert train(network, data, replace(PLAIN, epochs=1), run=Run(clock=lambda: float(next(ticks)))).seconds == 7


@pytest.mark.parametrize("count", [2, 3, 5, 63, 64, 65, 127, 129, 1000])
@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_batches_hold_every_image_and_never_only_one(count: int, batch_size: int) -> None:
    batches = even_split(torch.arange(count), batch_size)
    lengths = [len(batch) for batch in batches]
    assert torch.equal(torch.cat(batches), torch.arange(count))
    assert min(lengths) >= 2
    assert max(lengths) <= max(batch_size, 3)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("count", [2, 3, 5, 63, 64, 65, 127, 129, 1000])
@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_batches_of_one_length_hold_every_image_and_few_twice(count: int, batch_size: int) -> None:
    batches = equal_split(torch.arange(count), batch_size)
    assert len(batches) == len(even_split(torch.arange(count), batch_size))
    assert {len(batch) for batch in batches} == {len(batches[0])}
    assert torch.equal(torch.cat(batches)[:count], torch.arange(count))
    assert all(len(batch.unique()) == len(batch) for batch in batches)


@pytest.mark.parametrize(("sparing", "kept"), [(False, [1, 2, 3, 4]), (True, [1, 1, 1, 4])])
def test_a_sparing_training_passes_states_over(
    network: nn.Module, data: AugmentedImages, digits: Splits, tmp_path: Path, sparing: bool, kept: list[int]
) -> None:
    recipe, run = replace(PLAIN, epochs=4, eval_epochs=(1, 2, 3)), Run(checkpoint=tmp_path / "state", sparing=sparing)
    found: list[int] = []

    def look(epoch: int, accuracy: float) -> None:
        found.append(torch.load(tmp_path / "state", weights_only=True)["progress"]["epoch"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "APART", 1e9)
        train(network, data, recipe, val=digits.val, report=look, run=run)
    assert found == kept


def test_one_image_is_too_few() -> None:
    with pytest.raises(DataError, match="needs at least 2 images, got 1"):
        even_split(torch.arange(1), 8)


def test_evaluate_restores_the_mode_and_counts(network: nn.Module, digits: Splits) -> None:
    network.train()
    network.bn1.eval()
    before = weights(network)
    logits = predict_logits(network, digits.val, batch_size=7)
    accuracy = evaluate(network, digits.val)
    assert accuracy == pytest.approx((logits.argmax(1) == digits.val.labels).double().mean().item())
    assert logits.shape == (len(digits.val), 10)
    assert network.training
    assert not network.bn1.training
    assert torch.equal(weights(network), before)


def test_recalibration_gives_the_statistics_of_the_images(network: nn.Module, digits: Splits) -> None:
    inputs: list[Tensor] = []
    network.bn1.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    recalibrate(network, digits.train[:64], batch_size=64)
    assert not network.training
    assert network.bn1.momentum == 0.1
    torch.testing.assert_close(network.bn1.running_mean, inputs[0].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(network.bn1.running_var, inputs[0].var(dim=(0, 2, 3)))
    once = weights(network)
    recalibrate(network, digits.train[:64], batch_size=64)
    assert torch.equal(weights(network), once)  # nothing is left of what was there before


def test_recalibration_leaves_a_network_without_batch_norm_alone(digits: Splits) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    before = weights(network)
    recalibrate(network, digits.train)
    assert torch.equal(weights(network), before)


def test_the_sample_for_recalibration_is_augmented(data: AugmentedImages, digits: Splits) -> None:
    sample: Images = data.sample(20)
    assert sample.pixels.shape == (20, 1, 32, 32)
    assert not torch.equal(sample.pixels, digits.train.pixels[:20])
    assert torch.equal(sample.pixels[3], data.batch(0, torch.tensor([3])).pixels[0])


SPOILT = """
import torch
from torch import nn
from nas_kd.data.augment import default_augmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.training.evaluation import contiguous_where_it_overflows
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 24, 1, stride=2))
images = torch.randn(2, 8, 96, 96).contiguous(memory_format=torch.channels_last)
"""
STEPS = """
    for _ in range(8):
        network(images).square().mean().backward()
"""
TRAINED = """
network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
photos = Images(torch.randint(0, 255, (16, 8, 96, 96)).byte(), torch.arange(16), (0.5,) * 8, (0.25,) * 8)
train(network, AugmentedImages(photos, default_augmentation("digits"), 0), Recipe(epochs=4, batch_size=2, lr=0.01))
"""


@pytest.mark.parametrize(
    "use",
    [
        f"network.to(memory_format=torch.channels_last)\nwith contiguous_where_it_overflows(network):{STEPS}",
        f"with contiguous_where_it_overflows(network):{STEPS}",
        TRAINED,
    ],
    ids=["of the network", "of its input", "of a training"],
)
def test_a_narrow_strided_shortcut_does_not_spoil_memory(use: str) -> None:
    """oneDNN (torch 2.14) writes beyond a buffer on the way back of such a convolution with channels last: without our
    care the process ends by "double free or corruption"."""
    checked = {**os.environ, "LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    done = subprocess.run(
        [sys.executable, "-c", SPOILT + use], env=checked, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-300:]
