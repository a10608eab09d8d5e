"""What is paid for once: the images, the teacher, and its logits on augmented views."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from nas_kd.data.images import AugmentedImages, Images, ImageSet
from nas_kd.data.splits import Splits, load_splits, with_sample
from nas_kd.library.building import LibrarySpec, Share, open_builder, plan_library
from nas_kd.library.library import Library
from nas_kd.preparation.augmenting import augmentation_of, fresh_images, taught_views
from nas_kd.preparation.estimate import PROBE, library_images, plan_line
from nas_kd.preparation.job import (
    TEACHER,
    TEACHER_LR,
    TRANSFER_LR,
    Job,
    epochs_of,
    recipe_of,
    refine_epochs,
    transfer_epochs,
)
from nas_kd.progress import Stages
from nas_kd.search.storage import check_study
from nas_kd.training.teacher import (
    Renormalised,
    TeacherCache,
    TeacherResult,
    Teaching,
    adopt_teacher,
    prepare_teacher,
)
from nas_kd.training.transfer import HeadOrigin
from nas_kd.training.views import OnlineViews, Views

Sharing = Callable[[nn.Module, Images, LibrarySpec], AbstractContextManager[Share | None]]
_PERCENT = 100  # steps of a stage that says how far it is


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Materials:
    """What trials and refinement train on: the splits, `sample`, which is as much of them as trials look at, in memory,
    the trained base, the teacher, which is the base unless another one was named, and views with its logits."""

    splits: Splits
    sample: Splits
    base: TeacherResult
    teacher: TeacherResult
    proxy_views: Views | OnlineViews
    refine_views: Views | OnlineViews

    @property
    def digest(self) -> str:
        """Names what students begin with and what teaches them."""
        return _joint_digest(self.base, self.teacher)


def _joint_digest(base: TeacherResult, teacher: TeacherResult) -> str:
    return base.digest if teacher is base else f"{base.digest}-{teacher.digest}"


def gather(job: Job, stages: Stages, sharing: Sharing | None = None) -> tuple[Job, Materials]:
    """What `collect` gives, after a word on what is to come and about how long it takes."""
    stages.say(plan_line(job, _teacher_epochs(job, job.train_images), refine_epochs(job, job.train_images)))
    return collect(job, stages, sharing)


def collect(job: Job, stages: Stages, sharing: Sharing | None = None) -> tuple[Job, Materials]:
    """Images, the teacher, its logits on augmented views, and the library, which `sharing` shares out: everything that
    is paid for once. In the space of the job that comes back students start from the library. Raises StudyError as
    soon as one of them is seen not to be that of the study that goes on."""
    settings = job.settings
    with stages.stage("data"):
        splits = load_splits(job.data, job.cache)
    check_study(job.storage, settings.name, {"data": splits.digest})
    base = _base(job, splits, stages)
    teacher = base if job.other_teacher is None else _other_teacher(job, splits, stages)
    check_study(job.storage, settings.name, {"teacher": _joint_digest(base, teacher)})
    sample = with_sample(splits, job.data, settings.proxy.images, job.cache)
    subset = sample.train[: settings.proxy.images]
    short, long = (
        min(settings.training.views, epochs) for epochs in (settings.proxy.epochs, refine_epochs(job, splits.train))
    )
    with stages.stage("views", short + long) as advance:

        def views(images: ImageSet, count: int) -> Views | OnlineViews:
            fresh = fresh_images(settings.data, images, splits.num_classes)
            return taught_views(fresh, splits, teacher, count, job.cache, advance)

        proxy_views, whole = views(subset, short), views(splits.train, long)
    if settings.search.library_budget and job.space.library is None:
        job = job.with_library(_library(job, splits, base, stages, sharing))
    return job, Materials(
        splits=splits, sample=sample, base=base, teacher=teacher, proxy_views=proxy_views, refine_views=whole
    )


def gather_whole(job: Job, epochs: Callable[[Splits], int], stages: Stages) -> Materials:
    """What trainings on all images need, of as many epochs together as `epochs` says: `gather` without a search."""
    settings = job.settings
    with stages.stage("data"):
        splits = load_splits(job.data, job.cache)
    base = _base(job, splits, stages)
    teacher = base if job.other_teacher is None else _other_teacher(job, splits, stages)
    count = min(settings.training.views, epochs(splits))
    with stages.stage("views", count) as advance:
        fresh = fresh_images(settings.data, splits.train, splits.num_classes)
        views = taught_views(fresh, splits, teacher, count, job.cache, advance)
    return Materials(splits=splits, sample=splits, base=base, teacher=teacher, proxy_views=views, refine_views=views)


def _library(job: Job, splits: Splits, base: TeacherResult, stages: Stages, sharing: Sharing | None) -> Library:
    """The library of the base's blocks, with as many training steps as its share of the study's work allows."""
    size = job.space.input_size[1]
    augmented = AugmentedImages(splits.train, augmentation_of(job.settings.data, size), job.settings.seed)
    count = len(splits.train)
    affordable = library_images(job, count, _teacher_epochs(job, count), refine_epochs(job, splits.train))
    spec = plan_library(LibrarySpec(seed=job.settings.seed, anchor=False), job.space.analysis, affordable)
    images = augmented.sample(spec.images + spec.holdout)
    with stages.stage("library", _PERCENT) as advance:

        def report(words: str) -> None:
            advance(words, _PERCENT * getattr(words, "share", 0.0))

        with nullcontext() if sharing is None else sharing(base.network, images, spec) as share:
            builder = open_builder(base.network, job.space.analysis, images, spec, job.cache)
            return builder.build(report, share)


def _teacher_epochs(job: Job, images: int) -> int:
    """0 for a base that teaches as it is."""
    given = job.settings.teacher.epochs
    if job.trained_elsewhere:
        return given or 0
    affordable = epochs_of(given, (job.effort.teacher_images, TEACHER[1]), images, job.device)
    if job.transferred:
        return min(affordable, transfer_epochs(given, images, job.device))
    return affordable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pupil:
    """A network that is to know the classes: the origin of its `head` where its weights come from elsewhere, for how
    many `epochs` it is trained (0: not at all), and the `key` of it in the cache."""

    network: nn.Module
    head: HeadOrigin | None
    epochs: int
    key: str


def _base(job: Job, splits: Splits, stages: Stages) -> TeacherResult:
    """The base, which teaches too unless another network is to."""
    settings = job.settings
    pupil = _Pupil(
        network=job.space.base,
        head=job.head_origin,
        epochs=_teacher_epochs(job, len(splits.train)),
        key=f"{settings.network.model} {settings.network.pretrained} {settings.seed}",
    )
    return _taught(job, splits, pupil, stages, "teacher" if job.other_teacher is None else "base")


def _other_teacher(job: Job, splits: Splits, stages: Stages) -> TeacherResult:
    """Another network, for the same images and in the same way as the base."""
    settings, head, images = job.settings, job.other_head, len(splits.train)
    assert job.other_teacher is not None
    epochs = epochs_of(settings.teacher.epochs, TEACHER, images, job.device)
    if head is not None:
        epochs = 0 if head == "own" else transfer_epochs(settings.teacher.epochs, images, job.device)
    network = job.other_teacher if head is None else _as_it_wants(job.other_teacher, splits)
    pupil = _Pupil(network=network, head=head, epochs=epochs, key=f"{settings.teacher.model} {settings.seed}")
    return _taught(job, splits, pupil, stages, "teacher")


def _as_it_wants(network: nn.Module, splits: Splits) -> nn.Module:
    """The network with images that are normalised as its weights want them, where these are those of the base."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    wanted = tuple(config.get("mean", ())), tuple(config.get("std", ()))
    given = splits.mean, splits.std
    return network if len(wanted[0]) != len(given[0]) or wanted == given else Renormalised(network, given, wanted)


def _taught(job: Job, splits: Splits, pupil: _Pupil, stages: Stages, stage: str) -> TeacherResult:
    """A network, trained for these classes; of weights from elsewhere it is first made what suits the images."""
    network, settings = pupil.network.to(job.device), job.settings
    augmentation = augmentation_of(settings.data, job.space.input_size[1])
    with stages.stage(stage, pupil.epochs + (0 if pupil.head is None else PROBE) or 1) as advance:
        if not pupil.epochs:
            return adopt_teacher(network, splits, augmentation=augmentation, seed=settings.seed)

        def report(epoch: int, accuracy: float) -> None:
            words = f"{'' if epoch else 'before training: '}val accuracy {100 * accuracy:.1f} %"
            advance(words, 1 if epoch else PROBE)

        lr = TEACHER_LR if pupil.head is None else TRANSFER_LR
        recipe = dataclasses.replace(recipe_of(settings, pupil.epochs), distill_weight=0.0, lr=lr)
        return prepare_teacher(
            network,
            splits,
            Teaching(recipe=recipe, augmentation=augmentation, head=pupil.head),
            cache=TeacherCache(folder=job.cache, key=pupil.key),
            report=report,
        )
