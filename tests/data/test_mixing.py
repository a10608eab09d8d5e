from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.data.mixing import Mixing, mix_each
from nas_kd.data.splits import Splits
from nas_kd.errors import DataError, TrainingError
from nas_kd.rank_check.portions import Portions
from nas_kd.training.evaluation import predict_logits
from nas_kd.training.loop import train
from nas_kd.training.losses import soft_loss, student_loss
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import Teacher
from nas_kd.training.views import OnlineViews, ViewSpec, build_views, views_bytes

SHIFTED = Augmentation(flip=False)
BOTH = Mixing(num_classes=10, mixup=0.8, cutmix=1.0, smoothing=0.1)


@pytest.fixture
def images(digits: Splits) -> Images:
    return digits.train[:40]


def pair(label: int, other: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    black, white = torch.zeros(1, 1, 16, 16, dtype=torch.uint8), torch.full((1, 1, 16, 16), 200, dtype=torch.uint8)
    return (black, torch.tensor([label])), (white, torch.tensor([other]))


def test_mixup_blends_pixels_and_labels_alike() -> None:
    pixels, shares = mix_each(Mixing(num_classes=5, mixup=1.0), *pair(1, 3), seeds=[7])
    share = shares[0, 3].item()
    assert 0.01 < share < 0.99
    assert pixels.unique().tolist() == [round(200 * share)]
    torch.testing.assert_close(shares[0], torch.tensor([0, 1 - share, 0, share, 0]))


def test_cutmix_pastes_as_much_as_it_says() -> None:
    pixels, shares = mix_each(Mixing(num_classes=5, cutmix=1.0), *pair(1, 3), seeds=[2])
    assert pixels.unique().tolist() == [0, 200]
    assert shares[0, 3].item() == pytest.approx((pixels == 200).float().mean().item())


def test_unmixed_images_stay_and_their_labels_are_smoothed() -> None:
    mixing = Mixing(num_classes=5, mixup=1.0, mixup_prob=0.0, smoothing=0.1)
    pixels, shares = mix_each(mixing, *pair(1, 3), seeds=[7])
    assert pixels.sum() == 0
    torch.testing.assert_close(shares[0], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))


def test_smoothing_alone_is_torchs(images: Images) -> None:
    data = AugmentedImages(images, SHIFTED, 4, Mixing(num_classes=10, smoothing=0.1))
    batch, plain = data.batch(0, torch.arange(40)), AugmentedImages(images, SHIFTED, 4).batch(0, torch.arange(40))
    assert torch.equal(batch.pixels, plain.pixels)
    assert torch.equal(batch.classes, plain.labels)
    logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits, plain.labels, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, batch.labels), expected)


def test_a_mixed_image_does_not_depend_on_its_batch(images: Images) -> None:
    whole = AugmentedImages(images, SHIFTED, 4, BOTH).batch(1, torch.arange(40))
    indices = torch.tensor([7, 0, 39])
    alone = AugmentedImages(images, SHIFTED, 4, BOTH).batch(1, indices)
    assert torch.equal(alone.pixels, whole.pixels[indices])
    assert torch.equal(alone.labels, whole.labels[indices])
    later = AugmentedImages(images, SHIFTED, 4, BOTH).batch(2, indices)
    assert not torch.equal(later.labels, alone.labels)


def test_cached_and_online_distillation_agree(images: Images, network: nn.Module, tmp_path: Path) -> None:
    spec = ViewSpec(count=2, augmentation=SHIFTED, seed=4, mixing=BOTH)
    cached = build_views(images, network, spec, tmp_path)
    online = OnlineViews(AugmentedImages(images, SHIFTED, 4, BOTH), Teacher(network))
    unmixed = AugmentedImages(images, SHIFTED, 4).sample(10)
    for data in (cached, Portions(cached, 20), online):  # what calibrates batch norms
        assert torch.equal(data.sample(10).pixels, unmixed.pixels)
        assert torch.equal(data.sample(10).labels, unmixed.labels)
    batches = [data.batch(1, torch.tensor([3, 39])) for data in (cached, online)]
    assert torch.equal(batches[0].pixels, batches[1].pixels)
    assert torch.equal(batches[0].labels, batches[1].labels)
    seen = Images(batches[0].pixels, batches[0].classes, images.mean, images.std)
    for batch in batches:  # the teacher is asked on the mixed images
        assert batch.logits is not None
        torch.testing.assert_close(batch.logits, predict_logits(network, seen), rtol=1e-3, atol=1e-3)
    assert cached.bytes == views_bytes(images, spec, 10)
    recipe = Recipe(epochs=1, batch_size=20, lr=0.01, distill_weight=0.5)
    losses = train(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), cached, recipe).losses
    assert 0 < losses[0] < 100


def test_mixed_views_have_a_place_of_their_own(images: Images, tmp_path: Path) -> None:
    for mixing in (None, BOTH, Mixing(num_classes=10, smoothing=0.1)):
        build_views(images, None, ViewSpec(count=1, augmentation=SHIFTED, mixing=mixing), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_decoupled_kd_refuses_shares() -> None:
    logits, shares = torch.zeros(2, 3), torch.full((2, 3), 1 / 3)
    with pytest.raises(TrainingError, match="decoupled KD needs one class per image"):
        student_loss(logits, shares, logits, distill_weight=0.5, soft=soft_loss("dkd", temperature=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "mixing needs mixup, cutmix or smoothing"),
        ({"mixup": -1}, "mixup must be 0 or more"),
        ({"cutmix": float("inf")}, "cutmix must be 0 or more"),
        ({"mixup": 1, "mixup_prob": 2}, "mixup_prob must be a probability"),
        ({"smoothing": 1}, r"smoothing must be in \[0, 1\)"),
        ({"smoothing": 0.1, "num_classes": 1}, "num_classes must be at least 2"),
    ],
)
def test_nonsense_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Mixing(**{"num_classes": 10, **change})  # type: ignore[arg-type]
