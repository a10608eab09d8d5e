"""What a command is asked for makes of its training images: one place for their augmentation and mixing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nas_kd.arguments.augment import AugmentOptions
from nas_kd.arguments.data import DataSettings
from nas_kd.data.augment import (
    AnyAugmentation,
    Augmentation,
    PhotoAugmentation,
    default_augmentation,
    may_be_mirrored,
)
from nas_kd.data.images import AugmentedImages, Images, ImageSet
from nas_kd.data.mixing import Mixing
from nas_kd.data.splits import Splits
from nas_kd.errors import DataError
from nas_kd.training.teacher import Teacher, TeacherResult
from nas_kd.training.views import OnlineViews, Views, ViewSpec, build_views, views_bytes

_NAMES = {"aa": "auto_augment", "train_interpolation": "interpolation", "reprob": "re_prob", "remode": "re_mode"}


def augmentation_of(data: DataSettings, img_size: int) -> AnyAugmentation:
    """How training images with sides of so many pixels are augmented: by the size and kind of the data, and as the
    options say. Raises DataError for options that timm cannot read."""
    options, dataset = data.augment, data.dataset
    if options.no_aug:
        return Augmentation(shift=0, flip=False)
    chosen = default_augmentation(dataset, img_size)
    if options.crops and not isinstance(chosen, PhotoAugmentation):
        chosen = PhotoAugmentation(hflip=0.5 if may_be_mirrored(dataset) else 0.0)
    if isinstance(chosen, PhotoAugmentation):
        return dataclasses.replace(chosen, **_transforms(options))
    return chosen if options.hflip is None else dataclasses.replace(chosen, flip=_flips(options.hflip))


def _transforms(options: AugmentOptions) -> dict[str, Any]:
    given = {_NAMES.get(name, name): value for name, value in options.given.items()}
    known = {field.name for field in dataclasses.fields(PhotoAugmentation)}
    return {name: value for name, value in given.items() if name in known}


def _flips(probability: float) -> bool:
    if probability not in (0, 0.5):
        raise DataError(
            f"--hflip {probability:g}: small images are shifted and mirrored half of the time, or never (0); with "
            "--scale they are cropped and mirrored as timm does it"
        )
    return probability > 0


def mixing_of(data: DataSettings, num_classes: int) -> Mixing | None:
    """How a student's training images are mixed and their labels smoothed; None where neither is asked for."""
    options = data.augment
    if not options.softens:
        return None
    known = {field.name for field in dataclasses.fields(Mixing)}
    return Mixing(num_classes=num_classes, **{name: value for name, value in options.given.items() if name in known})


def images_key(data: DataSettings, splits: Splits) -> str:
    """What names the images that students see: their splits, and how they are augmented where that was said."""
    return " ".join(filter(None, (splits.digest, data.augment.text)))


def fresh_images(data: DataSettings, images: ImageSet, num_classes: int) -> AugmentedImages:
    """Training images of a student, augmented and mixed anew in every epoch."""
    augmentation = augmentation_of(data, images.shape[-1])
    return AugmentedImages(images, augmentation, data.seed, mixing_of(data, num_classes))


def taught_views(
    fresh: AugmentedImages,
    splits: Splits,
    teacher: TeacherResult,
    count: int,
    cache: Path,
    report: Callable[[str], None] = lambda words: None,
) -> Views | OnlineViews:
    """Training images with what a teacher makes of them: `count` views of each, kept in `cache` with its logits; or the
    teacher beside the student in every step, where there are to be none, they would be too large to keep or the images
    stream."""
    images = fresh.images
    spec = ViewSpec(
        count=max(1, count), augmentation=fresh.augmentation, seed=fresh.seed, key=splits.digest, mixing=fresh.mixing
    )
    if not count or not isinstance(images, Images) or views_bytes(images, spec, splits.num_classes) > spec.max_bytes:
        return OnlineViews(fresh, Teacher(teacher.network))
    return build_views(images, teacher.network, spec, cache, report)
