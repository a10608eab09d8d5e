"""What is paid for once: the images, the teacher, and its logits on augmented views."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from nas_kd.pipeline.effort import STUDENT
from nas_kd.pipeline.estimate import BASELINES, PROBE, plan_line
from nas_kd.pipeline.job import (
    TEACHER,
    TEACHER_LR,
    TRANSFER_LR,
    Job,
    epochs_of,
    recipe_of,
    refine_epochs,
    transfer_epochs,
)
from nas_kd.progress import Advance, Stages
from nas_kd.training.augment import default_augmentation
from nas_kd.training.data import Splits, load_splits
from nas_kd.training.images import AugmentedImages, Images
from nas_kd.training.library import Library
from nas_kd.training.library_building import LibrarySpec, build_library, plan_library
from nas_kd.training.teacher import Teacher, TeacherCache, TeacherResult, Teaching, adopt_teacher, prepare_teacher
from nas_kd.training.views import OnlineViews, Views, ViewSpec, build_views, views_bytes

_PERCENT = 100  # steps of a stage that says how far it is
_STEP = 3  # a training step costs about three forward passes


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
    stages.say(plan_line(job, _teacher_epochs(job, job.train_images), refine_epochs(job, job.train_images)))
    with stages.stage("data"):
        splits = load_splits(job.data, job.cache)
    teacher = _teacher(job, splits, stages)
    subset = splits.train[: settings.proxy_images]
    short, long = (min(settings.views, epochs) for epochs in (settings.proxy_epochs, refine_epochs(job, splits.train)))
    with stages.stage("views", short + long) as advance:
        proxy_views = _views(job, splits, teacher, short, subset, advance)
        whole = _views(job, splits, teacher, long, splits.train, advance)
    if settings.library_budget:
        job.space.library = _library(job, splits, teacher, stages)
    return Materials(splits=splits, teacher=teacher, proxy_views=proxy_views, refine_views=whole)


def gather_whole(job: Job, epochs: Callable[[Splits], int], stages: Stages) -> Materials:
    """What trainings on all images need, of as many epochs together as `epochs` says: `gather` without a search."""
    settings = job.settings
    with stages.stage("data"):
        splits = load_splits(job.data, job.cache)
    teacher = _teacher(job, splits, stages)
    count = min(settings.views, epochs(splits))
    with stages.stage("views", count) as advance:
        views = _views(job, splits, teacher, count, splits.train, advance)
    return Materials(splits=splits, teacher=teacher, proxy_views=views, refine_views=views)


def _library(job: Job, splits: Splits, teacher: TeacherResult, stages: Stages) -> Library:
    """The library of the teacher's blocks, with as many training steps as its share of the study's work allows."""
    augmented = AugmentedImages(splits.train, default_augmentation(job.settings.dataset), job.settings.seed)
    spec = plan_library(
        LibrarySpec(seed=job.settings.seed, anchor=False), job.space.analysis, _library_images(job, splits)
    )
    images = augmented.sample(spec.images + spec.holdout)
    with stages.stage("library", _PERCENT) as advance:

        def report(words: str) -> None:
            advance(words, _PERCENT * getattr(words, "share", 0.0))

        return build_library(teacher.network, job.space.analysis, images, spec, job.cache, report)


def _library_images(job: Job, splits: Splits) -> float:
    """How much the library may cost, in images that the base would see in the meantime (forward alone)."""
    settings = job.settings
    share = settings.library_budget / (1 - settings.library_budget)  # of everything else
    teacher = _teacher_epochs(job, len(splits.train))
    refine = refine_epochs(job, splits.train) * (settings.front + BASELINES)
    trials = settings.trials * settings.proxy_epochs * min(settings.proxy_images, len(splits.train))
    students = STUDENT * (trials + refine * len(splits.train))
    return share * _STEP * (teacher * len(splits.train) + students)


def _teacher_epochs(job: Job, images: int) -> int:
    """0 for a base that teaches as it is."""
    given = job.settings.teacher_epochs
    if job.trained_elsewhere:
        return given or 0
    if job.transferred:
        return transfer_epochs(given, images, job.device)
    return epochs_of(given, (job.effort.teacher_images, TEACHER[1]), images, job.device)


def _teacher(job: Job, splits: Splits, stages: Stages) -> TeacherResult:
    """The base, trained for these classes; of weights from elsewhere it is first made what suits the images."""
    epochs, base, settings = _teacher_epochs(job, len(splits.train)), job.space.base.to(job.device), job.settings
    augmentation = default_augmentation(settings.dataset)
    with stages.stage("teacher", epochs + (PROBE if job.transferred else 0) or 1) as advance:
        if not epochs:
            return adopt_teacher(base, splits, augmentation=augmentation, seed=settings.seed)

        def report(epoch: int, accuracy: float) -> None:
            words = f"{'' if epoch else 'before training: '}val accuracy {100 * accuracy:.1f} %"
            advance(words, 1 if epoch else PROBE)

        lr = TRANSFER_LR if job.transferred else TEACHER_LR
        recipe = dataclasses.replace(recipe_of(settings, epochs), distill_weight=0.0, lr=lr)
        return prepare_teacher(
            base,
            splits,
            Teaching(recipe=recipe, augmentation=augmentation, head=job.head_origin),
            cache=TeacherCache(folder=job.cache, key=f"{settings.model} {settings.pretrained} {settings.seed}"),
            report=report,
        )


def _views(
    job: Job, splits: Splits, teacher: TeacherResult, count: int, images: Images, advance: Advance
) -> Views | OnlineViews:
    """Cached views, or the teacher beside the student in every step where they would be too large to keep."""
    augmentation = default_augmentation(job.settings.dataset)
    spec = ViewSpec(count=count, augmentation=augmentation, seed=job.settings.seed, key=splits.digest)
    if views_bytes(images, spec, splits.num_classes) > spec.max_bytes:
        return OnlineViews(AugmentedImages(images, augmentation, job.settings.seed), Teacher(teacher.network))
    return build_views(images, teacher.network, spec, job.cache, advance)
