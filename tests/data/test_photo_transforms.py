from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nas_kd.data.augment import PhotoAugmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.data.originals import Originals
from nas_kd.errors import DataError
from nas_kd.training.teacher import Teacher
from nas_kd.training.views import OnlineViews, ViewSpec, build_views

EVERYTHING = PhotoAugmentation(vflip=0.3, auto_augment="rand-m9-mstd0.5", re_prob=0.5)
SIZE = 24


def noise(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def in_one_row(pictures: list[np.ndarray]) -> Originals:
    sizes = np.array([picture.shape[:2] for picture in pictures])
    lengths = np.array([picture.size for picture in pictures])
    pixels = np.concatenate([picture.ravel() for picture in pictures])
    return Originals(pixels, sizes, np.cumsum(lengths) - lengths, pictures[0].shape[2])


def shrink(picture: np.ndarray) -> torch.Tensor:
    image = Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def photos() -> Images:
    """12 photos of 48 × 64 or 64 × 48 pixels, and the same shrunk to 24 × 24."""
    pictures = [*noise(6, 48, 64), *noise(6, 64, 48)]
    pixels = torch.stack([shrink(picture) for picture in pictures])
    return Images(pixels, torch.arange(12) % 4, (0.5,) * 3, (0.25,) * 3, in_one_row(pictures))


def seen(images: Images, augmentation: PhotoAugmentation, epoch: int = 0, seed: int = 0) -> torch.Tensor:
    return AugmentedImages(images, augmentation, seed).batch(epoch, torch.arange(len(images))).pixels


def test_an_image_depends_on_seed_epoch_and_number_alone(photos: Images) -> None:
    whole = AugmentedImages(photos, EVERYTHING, 3)
    first = whole.batch(1, torch.arange(12))
    indices = torch.tensor([7, 2])
    assert torch.equal(AugmentedImages(photos, EVERYTHING, 3).batch(1, indices).pixels, first.pixels[indices])
    assert torch.equal(AugmentedImages(photos[:8], EVERYTHING, 3).batch(1, indices).pixels, first.pixels[indices])
    assert torch.equal(first.labels, photos.labels)
    for other in (whole.batch(2, indices), AugmentedImages(photos, EVERYTHING, 4).batch(1, indices)):
        assert all(not torch.equal(*pair) for pair in zip(other.pixels, first.pixels[indices], strict=True))


def test_the_callers_randomness_is_left_alone(photos: Images) -> None:
    def draws() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    seen(photos, EVERYTHING)
    assert draws() == expected


def test_a_crop_of_a_quarter_keeps_the_originals_detail(photos: Images) -> None:
    """A quarter of a 48 × 48 photo has exactly the 24 × 24 pixels that are wanted: nothing is interpolated."""
    squares = noise(4, 48, 48)
    labels, pixels = torch.zeros(4, dtype=torch.int64), torch.stack([shrink(picture) for picture in squares])
    images = Images(pixels, labels, (0.5,) * 3, (0.25,) * 3, in_one_row(list(squares)))
    quarter = PhotoAugmentation(scale=(0.25, 0.25), ratio=(1, 1), hflip=0)
    for crop, square in zip(seen(images, quarter), squares, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(square, (SIZE, SIZE, 3)).reshape(-1, SIZE, SIZE, 3)
        assert (windows == crop.permute(1, 2, 0).numpy()).all(axis=(1, 2, 3)).sum() == 1
    blurred = seen(replace(images, originals=None), quarter).double()
    assert blurred.diff(dim=-1).abs().mean() < seen(images, quarter).double().diff(dim=-1).abs().mean() / 2


def test_a_whole_square_is_the_image_itself(photos: Images) -> None:
    still = PhotoAugmentation(scale=(1, 1), ratio=(1, 1), hflip=0)
    assert torch.equal(seen(replace(photos, originals=None), still), photos.pixels)


def test_flips_are_what_their_probability_says(photos: Images) -> None:
    still = PhotoAugmentation(scale=(1, 1), ratio=(1, 1), hflip=1, vflip=1)
    assert torch.equal(seen(replace(photos, originals=None), still), photos.pixels.flip(-1, -2))


def test_erasing_with_the_mean_leaves_the_rest_to_the_bit(photos: Images) -> None:
    still = PhotoAugmentation(scale=(1, 1), ratio=(1, 1), hflip=0, re_prob=1, re_mode="const")
    erased = seen(replace(photos, originals=None), still)
    changed = (erased != photos.pixels).any(dim=1)
    assert changed.flatten(1).any(dim=1).all()
    assert (erased.permute(0, 2, 3, 1)[changed] == 128).all()


@pytest.mark.parametrize("change", [{"auto_augment": "rand-m9-mstd0.5"}, {"color_jitter": 0.4}, {"re_prob": 1.0}])
def test_grey_images_stay_grey(change: dict[str, object]) -> None:
    pictures = list(noise(3, 40, 30, channels=1))
    pixels = torch.zeros(3, 1, SIZE, SIZE, dtype=torch.uint8)
    images = Images(pixels, torch.arange(3), (0.5,), (0.25,), in_one_row(pictures))
    assert seen(images, PhotoAugmentation(**change)).shape == (3, 1, SIZE, SIZE)  # type: ignore[arg-type]


def test_a_part_of_the_images_brings_its_originals(photos: Images) -> None:
    part = photos[torch.tensor([7, 3])]
    assert part.picture(0).size == (48, 64)
    assert np.array_equal(np.array(part.picture(1)), np.array(photos.picture(3)))
    with pytest.raises(DataError, match="12 images with 3 originals"):
        replace(photos, originals=photos[:3].originals)


def test_cached_and_online_distillation_agree(photos: Images, small_network: nn.Module, tmp_path: Path) -> None:
    spec = ViewSpec(count=2, augmentation=EVERYTHING, seed=4)
    cached = build_views(photos, small_network, spec, tmp_path)
    online = OnlineViews(AugmentedImages(photos, EVERYTHING, 4), Teacher(small_network))
    indices = torch.tensor([5, 11, 0])
    for epoch in range(2):
        views, fresh = cached.batch(epoch, indices), online.batch(epoch, indices)
        assert torch.equal(views.pixels, fresh.pixels)
        assert views.logits is not None
        assert fresh.logits is not None
        torch.testing.assert_close(views.logits, fresh.logits, rtol=1e-3, atol=1e-3)
    shrunk = build_views(replace(photos, originals=None), small_network, spec, tmp_path)
    assert not torch.equal(shrunk.pixels, cached.pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": (0.5, 1.5)}, r"scale must be two shares in \(0, 1\]"),
        ({"scale": (0.9, 0.5)}, "scale must be"),
        ({"ratio": (0, 1)}, "ratio must be"),
        ({"hflip": 2}, "hflip must be a probability"),
        ({"re_prob": -0.1}, "re_prob must be a probability"),
        ({"color_jitter": float("nan")}, "color_jitter must be 0 or more"),
        ({"interpolation": "best"}, "interpolation must be one of random, bilinear"),
        ({"re_mode": "red"}, "re_mode must be one of"),
        ({"auto_augment": "rand-x9"}, "timm cannot read auto_augment 'rand-x9'"),
        ({"auto_augment": "best"}, "timm cannot read auto_augment 'best'"),
        ({"auto_augment": "v0", "color_jitter": 0.4}, "timm leaves color_jitter out"),
    ],
)
def test_nonsense_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        PhotoAugmentation(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "v0", "3a", "originalr"])
def test_timms_policies_are_read(policy: str) -> None:
    assert PhotoAugmentation(auto_augment=policy).auto_augment == policy


@pytest.fixture
def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(484, 4))
