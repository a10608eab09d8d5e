"""What all trainings of a rank check share: its space, its images in portions, and where students start."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nas_kd.arguments.study import Settings
from nas_kd.data.images import ImageSet
from nas_kd.genotype import Genotype
from nas_kd.library.library import Library
from nas_kd.pipeline.refining import fresh_student
from nas_kd.preparation.augmenting import images_key
from nas_kd.preparation.job import TEACHER_LR, Job, proxy_recipe_of, recipe_of
from nas_kd.preparation.materials import Materials
from nas_kd.rank_check.arguments import RankSettings
from nas_kd.rank_check.portions import Portions
from nas_kd.rank_check.validation import Validation, validation_of
from nas_kd.search.space import Space
from nas_kd.training.evaluation import CALIBRATION, recalibrate
from nas_kd.training.recipe import Recipe
from nas_kd.training.views import OnlineViews, Views

FRESH, CLOSED_FORM, LIBRARY = "fresh weights", "closed form", "library"
RUNGS = (1, 2, 4)  # portions of a proxy after which it is looked at; the last is its end
_TRUTH_STEPS = 25  # of a portion of a truth, about


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckContext:
    """What all trainings of a check share, on whichever machine: what is asked; names of the `teacher` and of the
    `images`, on which records depend; the `views` to train on, and the validation images, of which `validation` has
    those of the proxies."""

    settings: RankSettings
    device: torch.device
    teacher: str
    images: str
    num_classes: int
    val: ImageSet
    space: Space[nn.Module]
    views: Views | OnlineViews
    validation: Validation

    @property
    def study(self) -> Settings:
        """The settings of the study that the check speaks of."""
        return self.settings.study

    @functools.cached_property
    def portions(self) -> Portions:
        """The images in portions; `RUNGS[-1]` of them are a proxy."""
        return Portions(self.views, self.settings.proxy_images // RUNGS[-1], self.study.seed)

    @functools.cached_property
    def truth(self) -> Portions:
        """The images in portions of a truth, of which it has `truth_portions`."""
        count, _ = truth_portions(self.settings.truth_images, self.study.training.batch_size)
        return Portions(self.views, count, self.study.seed)

    @property
    def truth_portions(self) -> int:
        """How many portions a truth has."""
        return truth_portions(self.settings.truth_images, self.study.training.batch_size)[1]

    @property
    def clock(self) -> Callable[[], float]:
        """Other work on the same cores must not change what a score costs beside a truth."""
        return time.process_time if self.device.type == "cpu" else time.monotonic

    @property
    def starts(self) -> tuple[str, ...]:
        """Where the proxies start; the last is what a study starts from, and the truth."""
        starts = (FRESH, CLOSED_FORM) if self.library is None else (FRESH, CLOSED_FORM, LIBRARY)
        return starts if self.settings.starts == "all" else starts[-1:]

    @property
    def library(self) -> Library | None:
        """The space's library of trained block choices, or None."""
        return self.space.library

    def recipe(self, start: str, portions: int) -> Recipe:
        """How a student is trained from this start: gently where it inherits."""
        recipe = recipe_of(self.study, portions)
        return dataclasses.replace(recipe, lr=TEACHER_LR) if start == FRESH else recipe

    def proxy_recipe(self, start: str) -> Recipe:
        """How a proxy is trained from this start."""
        recipe = self.recipe(start, RUNGS[-1])
        return recipe if start == FRESH else dataclasses.replace(recipe, lr=proxy_recipe_of(self.study).lr)

    def student(self, genotype: Genotype, start: str) -> nn.Module:
        """The student on its device, its batch norms recalibrated where it inherits."""
        if start == FRESH:
            network = fresh_student(self.study.network, self.space, genotype, self.num_classes, self.study.seed)
            return network.to(self.device)
        student = self._space_of(start).student(genotype).to(self.device)
        recalibrate(student, self.portions.sample(CALIBRATION))
        return student

    def _space_of(self, start: str) -> Space[nn.Module]:
        if start == LIBRARY:
            return self.space
        return self.space.with_library(None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Check:
    """A rank check that is under way: what is there, and what its trainings share."""

    job: Job
    materials: Materials
    context: CheckContext


def context_of(job: Job, settings: RankSettings, materials: Materials) -> CheckContext:
    """What all trainings of a check share, where its command runs."""
    splits, study = materials.splits, job.settings
    return CheckContext(
        settings=settings,
        device=job.device,
        teacher=materials.digest,
        images=images_key(study.data, splits),
        num_classes=splits.num_classes,
        val=splits.val,
        space=job.space.widened(1 + settings.band),
        views=materials.refine_views,
        validation=validation_of(
            splits.val,
            materials.teacher.network,
            count=settings.val_images,
            temperature=recipe_of(study, 1).temperature,
            seed=study.seed,
        ),
    )


def truth_portions(images: int, batch_size: int) -> tuple[int, int]:
    """How many images a portion of a truth has, and how many of them there are: they do not depend on the proxies, so
    that other proxies can be held against the truths that are there."""
    number = math.ceil(images / (_TRUTH_STEPS * batch_size))
    return max(2, round(images / number)), number
