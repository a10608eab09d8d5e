"""What a rank check measures of one genotype: a truth, short trainings from several starts, and zero-cost scores."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nas_kd.data.images import normalise
from nas_kd.errors import TrainingError
from nas_kd.genotype import Genotype
from nas_kd.library.library import Library
from nas_kd.pipeline.refining import fresh_student
from nas_kd.preparation.augmenting import images_key
from nas_kd.preparation.job import TEACHER_LR, Job, proxy_recipe_of, recipe_of
from nas_kd.preparation.materials import Materials
from nas_kd.preparation.records import Record
from nas_kd.rank_check.portions import Portions
from nas_kd.rank_check.validation import Look, Validation
from nas_kd.rank_check.zero_cost import ZERO_COST
from nas_kd.search.space import Space
from nas_kd.training.evaluation import CALIBRATION, LOOK_CALIBRATION, evaluate, recalibrate
from nas_kd.training.loop import fit, student_task, train
from nas_kd.training.recipe import Recipe

FRESH, CLOSED_FORM, LIBRARY = "fresh weights", "closed form", "library"
RUNGS = (1, 2, 4)  # portions of a proxy after which it is looked at; the last is its end
_TRUTH_STEPS = 25  # of a portion of a truth, about
_VERSION = 1  # of what the records hold
_ZERO_COST_IMAGES = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ground:
    """What all trainings of a check share: the job and its materials, the images in portions (`RUNGS[-1]` of them are a
    proxy) and in those of a truth (`truth_portions` of them), the validation images of the proxies, and whether those
    begin from `every_start` or as in a study alone."""

    job: Job
    materials: Materials
    space: Space[nn.Module]
    portions: Portions
    truth: Portions
    truth_portions: int
    validation: Validation
    every_start: bool = True
    clock: Callable[[], float] = time.monotonic

    @property
    def starts(self) -> tuple[str, ...]:
        """Where the proxies start; the last is what a study starts from, and the truth."""
        starts = (FRESH, CLOSED_FORM) if self.library is None else (FRESH, CLOSED_FORM, LIBRARY)
        return starts if self.every_start else starts[-1:]

    @property
    def library(self) -> Library | None:
        """The space's library of trained block choices, or None."""
        return self.space.library

    def recipe(self, start: str, portions: int) -> Recipe:
        """How a student is trained from this start: gently where it inherits."""
        recipe = recipe_of(self.job.settings, portions)
        return dataclasses.replace(recipe, lr=TEACHER_LR) if start == FRESH else recipe

    def proxy_recipe(self, start: str) -> Recipe:
        """How a proxy is trained from this start."""
        recipe = self.recipe(start, RUNGS[-1])
        return recipe if start == FRESH else dataclasses.replace(recipe, lr=proxy_recipe_of(self.job.settings).lr)

    def student(self, genotype: Genotype, start: str) -> nn.Module:
        """The student on its device, its batch norms recalibrated where it inherits."""
        if start == FRESH:
            return fresh_student(self.job, self.space, genotype, self.materials.splits.num_classes)
        student = self._space_of(start).student(genotype).to(self.job.device)
        recalibrate(student, self.portions.sample(CALIBRATION))
        return student

    def _space_of(self, start: str) -> Space[nn.Module]:
        if start == LIBRARY or self.library is None:
            return self.space
        space = copy.copy(self.space)
        space.library = None
        return space


def truth_portions(images: int, batch_size: int) -> tuple[int, int]:
    """How many images a portion of a truth has, and how many of them there are: they do not depend on the proxies, so
    that other proxies can be held against the truths that are there."""
    number = math.ceil(images / (_TRUTH_STEPS * batch_size))
    return max(2, round(images / number)), number


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One thing to measure of every genotype, and a key that names all that it depends on but the genotype."""

    name: str
    key: str
    measure: Callable[[Genotype], Record]


def parts_of(ground: Ground) -> tuple[Part, ...]:
    """What is measured of each genotype; the truth comes last."""
    images = images_key(ground.job.settings, ground.materials.splits)
    shared = f"{_VERSION} {ground.materials.digest} {images} "
    shared += f"{ground.job.settings.seed} {getattr(ground.portions.views, 'count', 0)} "
    parts = [Part(name="zero-cost", key=_digest(shared), measure=functools.partial(_zero_cost, ground))]
    for start in ground.starts:
        about = (
            f"{start} {ground.portions.count} {ground.proxy_recipe(start)} {len(ground.validation.images)} "
            f"{_library_key(ground, start)} {LOOK_CALIBRATION}"
        )
        measure = functools.partial(_proxy, ground, start)
        parts.append(Part(name=start, key=_digest(shared + about), measure=measure))
    start = ground.starts[-1]
    recipe = ground.recipe(start, ground.truth_portions)
    about = f"truth {start} {ground.truth.count} {recipe} {_library_key(ground, start)}"
    return (*parts, Part(name="truth", key=_digest(shared + about), measure=functools.partial(_truth, ground)))


def _library_key(ground: Ground, start: str) -> str:
    return ground.library.folder.name if start == LIBRARY and ground.library is not None else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _truth(ground: Ground, genotype: Genotype) -> Record:
    """The accuracy on all validation images after a long training."""
    started = ground.clock()
    start = ground.starts[-1]
    student = ground.student(genotype, start)
    try:
        train(student, ground.truth, ground.recipe(start, ground.truth_portions))
    except TrainingError as error:
        return {"failed": str(error)}
    accuracy = evaluate(student, ground.materials.splits.val)
    return {"accuracy": accuracy, "seconds": round(ground.clock() - started, 3)}


class _Watch:
    """Looks at a network and keeps what was seen, and when: the time spent looking is no training."""

    def __init__(self, ground: Ground) -> None:
        self.validation, self.clock = ground.validation, ground.clock
        self.calibration = ground.portions.sample(LOOK_CALIBRATION)
        self.started, self.looking = self.clock(), 0.0
        self.looks: list[tuple[Look, float, float]] = []  # with the seconds of training before it, and its own

    def __call__(self, network: nn.Module) -> float:
        before = self.clock()
        recalibrate(network, self.calibration)
        look = self.validation.look(network)
        spent = self.clock() - before
        self.looks.append((look, before - self.started - self.looking, spent))
        self.looking += spent
        return look.accuracy


def _proxy(ground: Ground, start: str, genotype: Genotype) -> Record:
    """A short training with a schedule of its own, looked at on its rungs; and at its start where it inherits."""
    watch = _Watch(ground)
    student = ground.student(genotype, start)
    if start != FRESH:
        watch(student)
    recipe = dataclasses.replace(ground.proxy_recipe(start), eval_epochs=RUNGS)
    try:
        result = fit(student_task(student, recipe, watch), ground.portions, recipe)
    except TrainingError as error:
        return {"failed": str(error)}
    rungs = RUNGS if start == FRESH else (0, *RUNGS)
    steps = ground.portions.steps(recipe.batch_size)
    return {
        "rungs": [
            {
                "steps": portions * steps,
                "loss": steps * sum(result.losses[:portions]),
                **dataclasses.asdict(look),
                "train_seconds": round(training, 4),
                "look_seconds": round(looking, 4),
            }
            for portions, (look, training, looking) in zip(rungs, watch.looks, strict=True)
        ]
    }


def _zero_cost(ground: Ground, genotype: Genotype) -> Record:
    """Each zero-cost score of the untrained student, with its seconds."""
    student = ground.student(genotype, FRESH)
    images = ground.portions.sample(_ZERO_COST_IMAGES)
    pixels = normalise(images.pixels, images.mean, images.std, ground.job.device)
    labels = images.labels.to(ground.job.device)
    record: Record = {}
    for name, score in ZERO_COST.items():
        with torch.random.fork_rng():  # dropout
            torch.manual_seed(ground.job.settings.seed)
            started = ground.clock()
            record[name] = [score(student, pixels, labels), round(ground.clock() - started, 4)]
    return record
