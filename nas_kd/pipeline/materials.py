"""What is paid for once: the images, the teacher, and its logits on augmented views."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from nas_kd.pipeline.job import (
    REFINE,
    TEACHER,
    TEACHER_LR,
    TRANSFER_LR,
    Job,
    epochs_of,
    recipe_of,
    transfer_epochs,
)
from nas_kd.progress import Stages
from nas_kd.training.augment import default_augmentation
from nas_kd.training.data import Splits, load_splits
from nas_kd.training.images import AugmentedImages, Images
from nas_kd.training.library import Library
from nas_kd.training.library_building import LibrarySpec, build_library, plan_library
from nas_kd.training.teacher import Teacher, TeacherCache, TeacherResult, Teaching, adopt_teacher, prepare_teacher
from nas_kd.training.views import OnlineViews, Views, ViewSpec, build_views, views_bytes

_STEP = 3  # a training step costs about three forward passes
_STUDENT = 0.5  # and a student's about half of its base's: small operations are slow for their MACs
_BASELINES = 3  # that are refined beside the front


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Materials:
    """What trials and refinement train on: the splits, the teacher, and views with its logits."""

    splits: Splits
    teacher: TeacherResult
    proxy_views: Views | OnlineViews
    refine_views: Views | OnlineViews


def gather(job: Job, stages: Stages) -> Materials:
    """Images, the teacher, and its logits on augmented views: everything that is paid for once."""
    settings = job.settings
    with stages.stage("data"):
        splits = load_splits(job.data, job.cache)
    teacher = _teacher(job, splits, stages)
    refine_epochs = epochs_of(settings.refine_epochs, REFINE, splits, job.device)
    with stages.stage("views", 2) as advance:
        subset = splits.train[: settings.proxy_images]
        proxy_views = _views(job, splits, teacher, min(settings.views, settings.proxy_epochs), subset)
        advance("for trials")
        whole = _views(job, splits, teacher, min(settings.views, refine_epochs), splits.train)
        advance("for refinement")
    if settings.library_budget:
        job.space.library = _library(job, splits, teacher, stages)
    return Materials(splits=splits, teacher=teacher, proxy_views=proxy_views, refine_views=whole)


def gather_whole(job: Job, epochs: Callable[[Splits], int], stages: Stages) -> Materials:
    """What trainings on all images need, of as many epochs together as `epochs` says: `gather` without a search."""
    settings = job.settings
    with stages.stage("data"):
        splits = load_splits(job.data, job.cache)
    teacher = _teacher(job, splits, stages)
    with stages.stage("views"):
        views = _views(job, splits, teacher, min(settings.views, epochs(splits)), splits.train)
    return Materials(splits=splits, teacher=teacher, proxy_views=views, refine_views=views)


def _library(job: Job, splits: Splits, teacher: TeacherResult, stages: Stages) -> Library:
    """The library of the teacher's blocks, with as many training steps as its share of the study's work allows."""
    augmented = AugmentedImages(splits.train, default_augmentation(job.settings.dataset), job.settings.seed)
    spec = plan_library(
        LibrarySpec(seed=job.settings.seed, anchor=False), job.space.analysis, _library_images(job, splits)
    )
    images = augmented.sample(spec.images + spec.holdout)
    with stages.stage("library", 3 * len(job.space.blocks)) as advance:
        return build_library(teacher.network, job.space.analysis, images, spec, job.cache, advance)


def _library_images(job: Job, splits: Splits) -> float:
    """How much the library may cost, in images that the base would see in the meantime (forward alone)."""
    settings = job.settings
    share = settings.library_budget / (1 - settings.library_budget)  # of everything else
    teacher = _teacher_epochs(job, splits)
    refine = epochs_of(settings.refine_epochs, REFINE, splits, job.device) * (settings.front + _BASELINES)
    trials = settings.trials * settings.proxy_epochs * min(settings.proxy_images, len(splits.train))
    students = _STUDENT * (trials + refine * len(splits.train))
    return share * _STEP * (teacher * len(splits.train) + students)


def _teacher_epochs(job: Job, splits: Splits) -> int:
    """0 for a base that teaches as it is."""
    given = job.settings.teacher_epochs
    if job.trained_elsewhere:
        return given or 0
    if job.transferred:
        return transfer_epochs(given, splits, job.device)
    return epochs_of(given, TEACHER, splits, job.device)


def _teacher(job: Job, splits: Splits, stages: Stages) -> TeacherResult:
    """The base, trained for these classes; of weights from elsewhere it is first made what suits the images."""
    epochs, base, settings = _teacher_epochs(job, splits), job.space.base.to(job.device), job.settings
    augmentation = default_augmentation(settings.dataset)
    with stages.stage("teacher", epochs + job.transferred) as advance:
        if not epochs:
            return adopt_teacher(base, splits, augmentation=augmentation, seed=settings.seed)

        def report(epoch: int, accuracy: float) -> None:
            advance(f"{'' if epoch else 'before training: '}val accuracy {100 * accuracy:.1f} %")

        lr = TRANSFER_LR if job.transferred else TEACHER_LR
        recipe = dataclasses.replace(recipe_of(settings, epochs), distill_weight=0.0, lr=lr)
        return prepare_teacher(
            base,
            splits,
            Teaching(recipe=recipe, augmentation=augmentation, head=job.head_origin),
            cache=TeacherCache(folder=job.cache, key=f"{settings.model} {settings.pretrained} {settings.seed}"),
            report=report,
        )


def _views(job: Job, splits: Splits, teacher: TeacherResult, count: int, images: Images) -> Views | OnlineViews:
    """Cached views, or the teacher beside the student in every step where they would be too large to keep."""
    augmentation = default_augmentation(job.settings.dataset)
    spec = ViewSpec(count=count, augmentation=augmentation, seed=job.settings.seed, key=splits.digest)
    if views_bytes(images, spec, splits.num_classes) > spec.max_bytes:
        return OnlineViews(AugmentedImages(images, augmentation, job.settings.seed), Teacher(teacher.network))
    return build_views(images, teacher.network, spec, job.cache)
