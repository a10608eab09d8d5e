from __future__ import annotations

import hashlib

import pytest
import torch

from nas_kd.data.augment import (
    Augmentation,
    Draw,
    PhotoAugmentation,
    apply,
    augment,
    default_augmentation,
    draw,
)
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.errors import DataError


def images(count: int = 5, channels: int = 3, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def one(down: int, right: int, flip: bool) -> Draw:
    return Draw(torch.tensor([[down, right]]), torch.tensor([flip]))


def test_no_shift_and_no_flip_is_the_identity() -> None:
    pixels = images()
    assert torch.equal(augment(pixels, Augmentation(shift=0, flip=False), torch.Generator()), pixels)


def test_a_shift_moves_the_image_and_leaves_zeros() -> None:
    pixels = images(1)
    moved = apply(pixels, one(2, -1, False))
    assert torch.equal(moved[:, :, 2:, :-1], pixels[:, :, :-2, 1:])
    assert moved[:, :, :2].sum() == 0
    assert moved[..., -1].sum() == 0


@pytest.mark.parametrize(("down", "right", "flip"), [(0, 0, True), (2, 1, False), (-2, 1, True), (3, -3, True)])
@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_it_equals_padding_cropping_and_mirroring(down: int, right: int, flip: bool, padding: str) -> None:
    pixels, reach = images(1, size=8), 4
    mode = {"zero": "constant", "reflect": "reflect"}[padding]
    padded = torch.nn.functional.pad(pixels.float(), [reach] * 4, mode=mode)
    crop = padded[:, :, reach - down : reach - down + 8, reach - right : reach - right + 8].to(torch.uint8)
    expected = crop.flip(-1) if flip else crop
    assert torch.equal(apply(pixels, one(down, right, flip), padding), expected)


def test_every_image_gets_its_own_draw_within_reach() -> None:
    drawn = draw(2000, 16, Augmentation(shift=1 / 8), torch.Generator().manual_seed(0))
    assert drawn.shifts.unique().tolist() == [-2, -1, 0, 1, 2]
    assert 0.4 < drawn.flips.double().mean() < 0.6


def test_the_generator_decides() -> None:
    pixels = images()
    first, second, other = (augment(pixels, Augmentation(), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_an_image_does_not_depend_on_its_batch() -> None:
    pixels = images()
    drawn = draw(5, 8, Augmentation(), torch.Generator().manual_seed(0))
    alone = torch.tensor([3])
    assert torch.equal(apply(pixels, drawn)[3:4], apply(pixels[alone], drawn[alone]))


@pytest.mark.parametrize(
    ("dataset", "flip"),
    [("digits", False), ("torch/mnist", False), ("torch/svhn", False), ("torch/fashion_mnist", True), ("", True)],
)
def test_signs_are_not_mirrored(dataset: str, flip: bool) -> None:
    assert default_augmentation(dataset) == Augmentation(flip=flip)


def test_bad_values_are_refused() -> None:
    with pytest.raises(DataError, match=r"shift must lie in \[0, 0.5\]"):
        Augmentation(shift=0.6)
    with pytest.raises(DataError, match="padding must be one of zero, reflect"):
        Augmentation(padding="edge")


@pytest.mark.parametrize(("flip", "expected"), [(False, "46b8488ca51049fd"), (True, "c91b62a6dcfe41f3")])
def test_small_images_are_augmented_as_ever(flip: bool, expected: str) -> None:
    """The checksums are those of version 0.1.0: studies of digits go on with the same images."""
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = Images(pixels, torch.arange(12), (0.5,) * 3, (0.5,) * 3)
    data, digest = AugmentedImages(images, Augmentation(flip=flip), 4), hashlib.sha256()
    for epoch in range(3):
        digest.update(data.batch(epoch, torch.arange(12)).pixels.numpy().tobytes())
    assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize(
    ("dataset", "size", "photo"),
    [("folder", 64, True), ("torch/imagenet", 224, True), ("folder", 63, False), ("torch/cifar10", 224, False)],
)
def test_photos_are_cropped(dataset: str, size: int, photo: bool) -> None:
    assert isinstance(default_augmentation(dataset, size), PhotoAugmentation if photo else Augmentation)
