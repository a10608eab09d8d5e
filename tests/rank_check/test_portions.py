"""Data in portions, and what is seen of a network on validation images: real digits."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Batch
from nas_kd.data.splits import DataSpec, Splits, load_splits
from nas_kd.errors import DataError
from nas_kd.rank_check.portions import Portions
from nas_kd.rank_check.validation import validation_of
from nas_kd.training.evaluation import evaluate
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import Teacher
from nas_kd.training.views import OnlineViews, Views, ViewSpec, build_views

STILL = Augmentation(shift=0, flip=False)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load_splits(DataSpec(img_size=16, in_chans=1, train_images=120), tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    return network.eval()


@pytest.fixture(scope="module")
def views(splits: Splits, teacher: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Views:
    spec = ViewSpec(count=2, augmentation=Augmentation(flip=False))
    return build_views(splits.train, teacher, spec, tmp_path_factory.mktemp("views"))


def whole(portions: Portions, epoch: int) -> Batch:
    return portions.batch(epoch, torch.arange(len(portions)))


def places(batch: Batch, splits: Splits) -> list[int]:
    """Which training images these are."""
    same = (batch.pixels[:, None] == splits.train.pixels[None]).flatten(2).all(2)
    return same.int().argmax(1).tolist()


def still(splits: Splits, count: int, seed: int = 0) -> Portions:
    network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    return Portions(OnlineViews(AugmentedImages(splits.train, STILL), Teacher(network)), count, seed)


def test_a_pass_shows_every_image_once(splits: Splits) -> None:
    portions = still(splits, 50)
    seen = [place for epoch in range(12) for place in places(whole(portions, epoch), splits)]
    for number in range(5):  # 600 images are five passes of 120; portions begin in one and end in the next
        assert sorted(seen[120 * number : 120 * (number + 1)]) == list(range(120))
    assert seen[:120] != seen[120:240]


def test_portions_of_any_size_go_the_same_way(splits: Splits) -> None:
    small, large = still(splits, 20), still(splits, 60)
    first = [place for epoch in range(3) for place in places(whole(small, epoch), splits)]
    assert first == places(whole(large, 0), splits)
    assert places(whole(still(splits, 60, seed=1), 0), splits) != places(whole(large, 0), splits)


def test_labels_and_logits_belong_to_the_images(views: Views, splits: Splits, teacher: nn.Module) -> None:
    portions = Portions(views, 90)
    batch = portions.batch(1, torch.tensor([5, 80, 31, 2]))  # of two passes, which see two views
    assert batch.logits is not None
    for pixels, label, logits in zip(batch.pixels, batch.labels, batch.logits, strict=True):
        same = (views.pixels == pixels).flatten(2).all(2)
        view, image = same.nonzero()[0].tolist()
        assert views.labels[image] == label
        assert views.logits is not None
        assert torch.equal(views.logits[view, image].float(), logits)


def test_the_sample_mixes_classes_that_are_stored_one_after_another(splits: Splits, teacher: nn.Module) -> None:
    in_order = splits.train[splits.train.labels.argsort()]
    portions = Portions(OnlineViews(AugmentedImages(in_order, STILL), Teacher(teacher)), 40)
    assert len(portions.sample(40).labels.unique()) == 10
    assert len(portions.sample(1000)) == 120


def test_a_training_reports_after_each_portion(views: Views, splits: Splits) -> None:
    torch.manual_seed(0)
    student = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    reports: list[int] = []
    recipe = Recipe(epochs=4, batch_size=32, eval_epochs=(1, 2, 4))
    result = train(
        student, Portions(views, 64), recipe, val=splits.val, report=lambda epoch, accuracy: reports.append(epoch)
    )
    assert reports == [1, 2, 4]
    assert result.images == 4 * 64
    assert len(result.losses) == 4


def test_a_portion_of_one_image_is_refused(views: Views) -> None:
    with pytest.raises(DataError, match="at least 2 images, got 1"):
        Portions(views, 1)


def test_a_look_is_what_evaluation_says(splits: Splits, teacher: nn.Module) -> None:
    torch.manual_seed(1)
    student = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    validation = validation_of(splits.val, teacher, count=25, temperature=4.0, seed=0)
    look = validation.look(student)
    assert len(validation.images) == 25
    assert look.accuracy == evaluate(student, validation.images)
    assert look.distillation > 0
    ours = validation.look(teacher)
    assert ours.distillation == pytest.approx(0, abs=1e-6)
    expected = nn.functional.cross_entropy(validation.teacher_logits, validation.images.labels).item()
    assert ours.cross_entropy == pytest.approx(expected)


def test_the_images_to_look_at_are_drawn_from_all(splits: Splits, teacher: nn.Module) -> None:
    in_order = splits.val[splits.val.labels.argsort()]
    some = validation_of(in_order, teacher, count=20, temperature=4.0, seed=0)
    assert len(some.images.labels.unique()) > 5
    everything = validation_of(in_order, teacher, count=10**6, temperature=4.0, seed=0)
    assert torch.equal(everything.images.pixels, in_order.pixels)
