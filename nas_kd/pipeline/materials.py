"""What is paid for once: the images, the teacher, and its logits on augmented views."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from nas_kd.pipeline.augmenting import augmentation_of, fresh_images
from nas_kd.pipeline.job import REFINE, TEACHER, TEACHER_LR, Job, epochs_of, recipe_of
from nas_kd.progress import Advance, Stages
from nas_kd.training.data import Splits, load_splits
from nas_kd.training.images import AugmentedImages, Images
from nas_kd.training.library import Library
from nas_kd.training.library_building import LibrarySpec, build_library, plan_library
from nas_kd.training.teacher import Teacher, TeacherCache, TeacherResult, adopt_teacher, prepare_teacher
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
    epochs = epochs_of(settings.teacher_epochs, TEACHER, splits, job.device)
    with stages.stage("teacher", 1 if job.trained_elsewhere else epochs) as advance:
        teacher = _teacher(job, splits, epochs, advance)
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
    teaching = epochs_of(settings.teacher_epochs, TEACHER, splits, job.device)
    with stages.stage("teacher", 1 if job.trained_elsewhere else teaching) as advance:
        teacher = _teacher(job, splits, teaching, advance)
    with stages.stage("views"):
        views = _views(job, splits, teacher, min(settings.views, epochs(splits)), splits.train)
    return Materials(splits=splits, teacher=teacher, proxy_views=views, refine_views=views)


def _library(job: Job, splits: Splits, teacher: TeacherResult, stages: Stages) -> Library:
    """The library of the teacher's blocks, with as many training steps as its share of the study's work allows."""
    size = job.space.input_size[1]
    augmented = AugmentedImages(splits.train, augmentation_of(job.settings, size), job.settings.seed)
    spec = plan_library(LibrarySpec(seed=job.settings.seed), job.space.analysis, _library_images(job, splits))
    images = augmented.sample(spec.images + spec.holdout)
    with stages.stage("library", 3 * len(job.space.blocks)) as advance:
        return build_library(teacher.network, job.space.analysis, images, spec, job.cache, advance)


def _library_images(job: Job, splits: Splits) -> float:
    """How much the library may cost, in images that the base would see in the meantime (forward alone)."""
    settings = job.settings
    share = settings.library_budget / (1 - settings.library_budget)  # of everything else
    teacher = 0 if job.trained_elsewhere else epochs_of(settings.teacher_epochs, TEACHER, splits, job.device)
    refine = epochs_of(settings.refine_epochs, REFINE, splits, job.device) * (settings.front + _BASELINES)
    trials = settings.trials * settings.proxy_epochs * min(settings.proxy_images, len(splits.train))
    students = _STUDENT * (trials + refine * len(splits.train))
    return share * _STEP * (teacher * len(splits.train) + students)


def _teacher(job: Job, splits: Splits, epochs: int, advance: Advance) -> TeacherResult:
    base = job.space.base.to(job.device)
    if job.trained_elsewhere:
        return adopt_teacher(base, splits)
    settings = job.settings
    recipe = dataclasses.replace(recipe_of(settings, epochs), distill_weight=0.0)
    if not settings.pretrained:  # pretrained weights are tuned gently, like inherited ones
        recipe = dataclasses.replace(recipe, lr=TEACHER_LR)
    cache = TeacherCache(folder=job.cache, key=f"{settings.model} {settings.pretrained} {settings.seed}")
    augmentation = augmentation_of(settings, job.space.input_size[1])

    def report(epoch: int, accuracy: float) -> None:
        advance(f"val accuracy {100 * accuracy:.1f} %")

    return prepare_teacher(base, splits, recipe=recipe, augmentation=augmentation, cache=cache, report=report)


def _views(job: Job, splits: Splits, teacher: TeacherResult, count: int, images: Images) -> Views | OnlineViews:
    """Cached views, or the teacher beside the student in every step where they would be too large to keep."""
    fresh = fresh_images(job.settings, images, splits.num_classes)
    spec = ViewSpec(
        count=count,
        augmentation=fresh.augmentation,
        seed=job.settings.seed,
        key=splits.digest,
        mixing=fresh.mixing,
    )
    if views_bytes(images, spec, splits.num_classes) > spec.max_bytes:
        return OnlineViews(fresh, Teacher(teacher.network))
    return build_views(images, teacher.network, spec, job.cache)
