"""How one model of the results is trained: what it begins with, on what, by which recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nas_kd.arguments.network import NetworkSettings
from nas_kd.arguments.study import Settings
from nas_kd.data.augment import derive_seed
from nas_kd.data.splits import Splits
from nas_kd.genotype import Genotype
from nas_kd.pipeline.baselines import WantedModel
from nas_kd.preparation.augmenting import fresh_images, images_key
from nas_kd.preparation.job import TEACHER_LR, Job, make_base, recipe_of
from nas_kd.preparation.materials import Materials
from nas_kd.progress import Advance
from nas_kd.results.refine import Candidate, Refined, Refinement, kept_at, refine
from nas_kd.results.rows import Role
from nas_kd.search.space import Space
from nas_kd.students.building import build_student
from nas_kd.training.evaluation import CALIBRATION, recalibrate
from nas_kd.training.recipe import Recipe
from nas_kd.training.views import OnlineViews, Views


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RefinementContext:
    """Where models of the results are trained, on whichever machine: on which images and views, as the study's settings
    say; the folder `cache` keeps them, and `key` names what they depend on besides their recipes and genotypes."""

    settings: Settings
    device: torch.device
    cache: Path
    splits: Splits
    views: Views | OnlineViews
    key: str


def refinement_context(job: Job, materials: Materials) -> RefinementContext:
    """Where a study's own command trains its models."""
    settings, splits = job.settings, materials.splits
    return RefinementContext(
        settings=settings,
        device=job.device,
        cache=job.cache,
        splits=splits,
        views=materials.refine_views,
        key=f"{images_key(settings.data, splits)} {materials.digest} {settings.training.views} {settings.seed}",
    )


def refine_one(job: Job, wanted: WantedModel, materials: Materials, advance: Advance) -> Refined:
    """Trains one model of a plan, or fetches what was trained before."""
    return refine_in(refinement_context(job, materials), wanted, advance)


def refine_in(context: RefinementContext, wanted: WantedModel, advance: Advance) -> Refined:
    """Trains one model of a plan in a context, or fetches what was trained there before."""

    def report(epoch: int, accuracy: float) -> None:
        advance(f"{wanted.role}: val accuracy {100 * accuracy:.1f} %")

    return refine(*_refinement(context, wanted), report=report)


def file_of(context: RefinementContext, wanted: WantedModel) -> Path:
    """The file that keeps a model of a plan once it is trained."""
    return kept_at(*_refinement(context, wanted))


def is_refined(job: Job, wanted: WantedModel, materials: Materials) -> bool:
    """Whether a model of a plan was trained before."""
    return file_of(refinement_context(job, materials), wanted).exists()


def _refinement(context: RefinementContext, wanted: WantedModel) -> tuple[Candidate, Refinement]:
    role, genotype, space, settings = wanted.role, wanted.genotype, wanted.space, context.settings
    online = settings.refinement.distill == "online" and role != "no teacher"
    views, splits = context.views, context.splits
    fresh = fresh_images(settings.data, splits.train, splits.num_classes)

    def build(number: int) -> nn.Module:
        if online or role == "no teacher":  # from scratch
            seed = derive_seed(settings.seed, "peer", number) if online else settings.seed
            network = fresh_student(settings.network, space, genotype, splits.num_classes, seed)
            return network.to(context.device)
        student = wanted.start.build() if wanted.start is not None else space.student(genotype)
        return student.to(context.device)

    def settle(student: nn.Module) -> None:
        if role != "no teacher":  # what is inherited
            recalibrate(student, views.sample(CALIBRATION))

    refinement = Refinement(
        data=fresh if online else views,
        splits=splits,
        recipe=_recipe(settings, role, wanted.epochs),
        folder=context.cache,
        key=context.key,
        peers=settings.refinement.peers if online else 0,
    )

    digest = genotype.digest if wanted.start is None else f"{genotype.digest} {wanted.start.digest}"
    return Candidate(role=role, digest=digest, build=build, settle=settle), refinement


def _recipe(settings: Settings, role: Role, epochs: int) -> Recipe:
    """How a model of the results is trained: what starts from scratch takes larger steps."""
    recipe = dataclasses.replace(recipe_of(settings, epochs), eval_epochs=tuple(range(1, epochs + 1)))
    if role == "no teacher":
        return dataclasses.replace(recipe, lr=TEACHER_LR, distill_weight=0.0)
    if settings.refinement.distill == "online":
        return dataclasses.replace(recipe, lr=TEACHER_LR)
    return dataclasses.replace(recipe, distill=settings.refinement.distill)


def fresh_student(
    network: NetworkSettings, space: Space[nn.Module], genotype: Genotype, classes: int, seed: int
) -> nn.Module:
    """The student of a genotype with random weights, the same for the same seed."""
    base = make_base(dataclasses.replace(network, pretrained=False), classes, space.input_size[0], seed)
    with torch.random.fork_rng():  # the cheap convolutions get weights of their own
        torch.manual_seed(derive_seed(seed, "fresh weights"))
        return build_student(base, space.analysis, genotype)
