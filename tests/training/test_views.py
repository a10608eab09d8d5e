from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.data.splits import Splits
from nas_kd.errors import DataError, TrainingError
from nas_kd.training.evaluation import predict_logits
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import Teacher
from nas_kd.training.views import OnlineViews, ViewSpec, build_views

SPEC = ViewSpec(count=3, augmentation=Augmentation(flip=False), seed=4)


@pytest.fixture
def images(digits: Splits) -> Images:
    return digits.train[:40]


def test_views_are_what_online_augmentation_gives(images: Images, tmp_path: Path) -> None:
    views = build_views(images, None, SPEC, tmp_path)
    online = AugmentedImages(images, SPEC.augmentation, SPEC.seed)
    indices = torch.tensor([7, 0, 39])
    for epoch in range(3):
        batch = views.batch(epoch, indices)
        assert torch.equal(batch.pixels, online.batch(epoch, indices).pixels)
        assert torch.equal(batch.labels, images.labels[indices])
        assert batch.logits is None


def test_logits_are_the_teachers_on_exactly_these_images(images: Images, network: nn.Module, tmp_path: Path) -> None:
    network.train()  # asked in eval mode all the same
    views = build_views(images, network, SPEC, tmp_path)
    pixels, labels, logits = views.epoch(1)
    assert logits is not None
    expected = predict_logits(network, replace(images, pixels=pixels))
    torch.testing.assert_close(logits.float(), expected, rtol=1e-3, atol=1e-3)
    assert views.logits is not None
    assert views.logits.dtype == torch.float16
    assert torch.equal(labels, images.labels)
    assert network.training


def test_epochs_come_round_again(images: Images, tmp_path: Path) -> None:
    views = build_views(images, None, SPEC, tmp_path)
    assert views.count == 3
    assert torch.equal(views.epoch(0)[0], views.epoch(3)[0])
    assert not torch.equal(views.epoch(0)[0], views.epoch(1)[0])


def test_they_are_built_once(
    images: Images, network: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = build_views(images, network, SPEC, tmp_path)
    with caplog.at_level(logging.INFO):
        second = build_views(images, network, SPEC, tmp_path)
    assert caplog.text == ""
    assert torch.equal(first.pixels, second.pixels)
    assert len(list(tmp_path.iterdir())) == 1


def test_everything_that_matters_makes_other_views(
    images: Images, make_network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    build_views(images, make_network(0), SPEC, tmp_path)
    for spec in (replace(SPEC, seed=5), replace(SPEC, count=1), replace(SPEC, key="x")):
        build_views(images, make_network(0), spec, tmp_path)
    build_views(images, make_network(1), SPEC, tmp_path)
    build_views(images[:30], make_network(0), SPEC, tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("name", ["pixels", "logits"])
def test_a_damaged_file_is_rebuilt(
    images: Images, network: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    first = build_views(images, network, SPEC, tmp_path).pixels.clone()
    file = next(tmp_path.glob(f"*/{name}.npy"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 0xFF
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        second = build_views(images, network, SPEC, tmp_path)
    assert f"{name}.npy does not match its checksum" in caplog.text
    assert torch.equal(first, second.pixels)


def test_too_large_a_cache_is_refused(images: Images, network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 views of 40 images need .* GiB, the limit is"):
        build_views(images, network, replace(SPEC, max_bytes=1000), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_teacher_is_refused(images: Images, network: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        network.fc.bias.fill_(float("inf"))
    with pytest.raises(TrainingError, match="the teacher gives logits up to inf"):
        build_views(images, network, SPEC, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_views_are_refused() -> None:
    with pytest.raises(DataError, match="count must be at least 1"):
        replace(SPEC, count=0)


def test_cached_and_online_distillation_agree(
    images: Images, make_network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    teacher, recipe = make_network(1), Recipe(epochs=2, batch_size=20, lr=0.01, distill_weight=0.9)
    cached = build_views(images, teacher, SPEC, tmp_path)
    online = OnlineViews(AugmentedImages(images, SPEC.augmentation, SPEC.seed), Teacher(teacher))
    losses = [train(make_network(2), data, recipe).losses for data in (cached, online)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
