"""What is to be made a model of the results, and the baselines that a front must beat."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from nas_kd.budget import CYCLES, LATENCY, MEASURED, Budget
from nas_kd.costs.cycle_table import CycleTable
from nas_kd.data.augment import derive_seed
from nas_kd.errors import ModelError
from nas_kd.genotype import Genotype
from nas_kd.preparation.job import Job
from nas_kd.results.rows import Role
from nas_kd.search.options import parse_options
from nas_kd.search.space import Space
from nas_kd.search.starts import random_genotype, uniform_width_students

_ATTEMPTS = 5  # to draw a random student that is as fast as its blocks promise
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """Weights that a model begins with: how to build the student with them, and a digest that names them."""

    build: Callable[[], nn.Module]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WantedModel:
    """A model to be made: what for, which genotype, and the space that the genotype is of; how many epochs it trains,
    and what it begins with where that is not what the space gives."""

    role: Role
    genotype: Genotype
    space: Space[nn.Module]
    epochs: int
    start: Start | None = None


def baselines(job: Job, best: Genotype, epochs: int) -> list[WantedModel]:
    """What the front must beat: its own best one without a teacher, one width everywhere, a random genotype."""
    wanted = plain_baselines(job, best, epochs)
    drawn = _random(job)
    if drawn is not None:
        wanted.append(WantedModel(role="random", genotype=drawn, space=job.space, epochs=epochs))
    return wanted


def plain_baselines(job: Job, best: Genotype, epochs: int) -> list[WantedModel]:
    """What any way to choose `best` must beat: the same without a teacher, and one width everywhere."""
    baselines = [WantedModel(role="no teacher", genotype=best, space=job.space, epochs=epochs)]
    whole = whole_space(job)
    uniform = None if whole is None else _uniform(job, whole)
    if whole is not None and uniform is not None:
        baselines.append(WantedModel(role="uniform", genotype=uniform, space=whole, epochs=epochs))
    return baselines


def _uniform(job: Job, whole: Space[nn.Module]) -> Genotype | None:
    """The widest uniform student within the budget, its latency and cycles measured where they are bounded."""
    measures: dict[str, Callable[[Genotype], int]] = {}
    costs = job.space.costs
    if costs.latency is not None:
        measures[LATENCY] = whole.costs.whole_models(costs.latency.meter).whole
    if costs.cycles is not None and costs.cycles.estimator is not None:
        measures[CYCLES] = CycleTable(whole.base, whole.analysis, whole.input_size, costs.cycles.estimator).whole
    counted = Budget(tuple((kind, bound) for kind, bound in job.budget.bounds if kind not in MEASURED))
    wanted = [(measures[kind], job.budget[kind]) for kind in MEASURED if kind in job.budget and kind in measures]
    students = uniform_width_students(whole.table, counted)
    return next((g for g in students if all(measure(g) <= bound for measure, bound in wanted)), None)


def _random(job: Job) -> Genotype | None:
    """The first random student within the budget, its latency measured where that is bounded."""
    for attempt in range(_ATTEMPTS):
        seed = derive_seed(job.settings.seed, "random genotype", *([attempt] if attempt else []))
        drawn = random_genotype(job.space.table, job.budget, seed)
        if drawn is None or job.budget.admits(job.space.confirmed_cost(drawn)):
            return drawn
    return None


def whole_space(job: Job) -> Space[nn.Module] | None:
    """A job's base with every width open, residual streams too: what a person narrows without a search."""
    return whole_of(job.space, job.settings.network.model)


def whole_of(space: Space[nn.Module], name: str) -> Space[nn.Module] | None:
    """The base of a space, which has this name, with every width open."""
    options = parse_options("width", search_stages=True)
    try:
        whole = Space(space.base, img_size=space.input_size[1], options=options, name=name)
        return whole if space.table.device is None else whole.with_costs(whole.costs.with_device())
    except ModelError as error:
        _logger.warning("no uniform student to compare with: %s", error)
        return None
