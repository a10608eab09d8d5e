"""How one model of the results is trained: what it begins with, on what, by which recipe."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from nas_kd.arguments.study import Settings
from nas_kd.genotype import Genotype
from nas_kd.pipeline.baselines import Wanted
from nas_kd.preparation.augmenting import fresh_images, images_key
from nas_kd.preparation.job import TEACHER_LR, Job, make_base, recipe_of
from nas_kd.preparation.materials import Materials
from nas_kd.progress import Advance
from nas_kd.results.refine import Candidate, Refined, Refinement, kept_at, refine
from nas_kd.results.rows import Role
from nas_kd.search.space import Space
from nas_kd.students.building import build_student
from nas_kd.training.augment import derive_seed
from nas_kd.training.evaluation import CALIBRATION, recalibrate
from nas_kd.training.recipe import Recipe


def refine_one(job: Job, wanted: Wanted, materials: Materials, advance: Advance) -> Refined:
    """Trains one model of a plan, or fetches what was trained before."""

    def report(epoch: int, accuracy: float) -> None:
        advance(f"{wanted.role}: val accuracy {100 * accuracy:.1f} %")

    return refine(*_refinement(job, wanted, materials), report=report)


def is_refined(job: Job, wanted: Wanted, materials: Materials) -> bool:
    """Whether a model of a plan was trained before."""
    return kept_at(*_refinement(job, wanted, materials)).exists()


def _refinement(job: Job, wanted: Wanted, materials: Materials) -> tuple[Candidate, Refinement]:
    role, genotype, space, settings = wanted.role, wanted.genotype, wanted.space, job.settings
    online = settings.distill == "online" and role != "no teacher"
    views = materials.refine_views
    fresh = fresh_images(settings, materials.splits.train, materials.splits.num_classes)

    def build(number: int) -> nn.Module:
        if online or role == "no teacher":  # from scratch
            seed = derive_seed(settings.seed, "peer", number) if online else settings.seed
            seeded = dataclasses.replace(job, settings=dataclasses.replace(settings, seed=seed))
            return fresh_student(seeded, space, genotype, materials.splits.num_classes)
        student = wanted.start.build() if wanted.start is not None else space.student(genotype)
        recalibrate(student.to(job.device), views.sample(CALIBRATION))
        return student

    refinement = Refinement(
        data=fresh if online else views,
        splits=materials.splits,
        recipe=_recipe(settings, role, wanted.epochs),
        folder=job.cache,
        key=f"{images_key(settings, materials.splits)} {materials.digest} {settings.views} {settings.seed}",
        peers=settings.peers if online else 0,
    )

    digest = genotype.digest if wanted.start is None else f"{genotype.digest} {wanted.start.digest}"
    return Candidate(role=role, digest=digest, build=build), refinement


def _recipe(settings: Settings, role: Role, epochs: int) -> Recipe:
    """How a model of the results is trained: what starts from scratch takes larger steps."""
    recipe = dataclasses.replace(recipe_of(settings, epochs), eval_epochs=tuple(range(1, epochs + 1)))
    if role == "no teacher":
        return dataclasses.replace(recipe, lr=TEACHER_LR, distill_weight=0.0)
    if settings.distill == "online":
        return dataclasses.replace(recipe, lr=TEACHER_LR)
    return dataclasses.replace(recipe, distill=settings.distill)


def fresh_student(job: Job, space: Space[nn.Module], genotype: Genotype, classes: int) -> nn.Module:
    """The student of a genotype with random weights, the same for the same seed, on the job's device."""
    base = make_base(dataclasses.replace(job.settings, pretrained=False), classes, job.data.in_chans)
    with torch.random.fork_rng():  # the cheap convolutions get weights of their own
        torch.manual_seed(derive_seed(job.settings.seed, "fresh weights"))
        return build_student(base, space.analysis, genotype).to(job.device)
