"""Structure learning as a user runs it: widths learnt within a budget, the network narrowed, distilled, exported."""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from optuna.storages import InMemoryStorage
from safetensors import SafetensorError
from torch import nn

from nas_kd.analysis.structure import Analysis
from nas_kd.budget import Budget
from nas_kd.data.splits import Splits
from nas_kd.errors import BudgetError, CheckpointError, GenotypeError, nearest
from nas_kd.files.atomic import write_text
from nas_kd.files.digests import digest_of
from nas_kd.files.tensors import read_tensors, write_tensors
from nas_kd.genotype import Genotype
from nas_kd.learnt_widths.arguments import StructureSettings
from nas_kd.learnt_widths.channel_cost import segments_of
from nas_kd.learnt_widths.learning import Goal, LearntWidths, WidthLearner, learn_widths
from nas_kd.learnt_widths.scale_factors import FILTERS, ScaleFactors
from nas_kd.pipeline.baselines import Start, WantedModel, plain_baselines
from nas_kd.pipeline.models import make_models
from nas_kd.preparation.augmenting import images_key
from nas_kd.preparation.job import Job, prepare, recipe_of, refine_epochs
from nas_kd.preparation.materials import Materials, gather_whole
from nas_kd.progress import Stages
from nas_kd.results.front import write_front_csv
from nas_kd.results.rows import ModelRow
from nas_kd.search.solver import solve
from nas_kd.students.inheritance import inherit_student
from nas_kd.training.checkpoint import load_exactly
from nas_kd.training.loop import Run

FILE = "structure.json"
_WARMUP = 0.1  # of the steps; channels are given up while the learning rate is high
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRow:
    """What was learnt of a block: its λ in shares of the one λ, how many `units` it has and how many were in use, the
    `width` that it got, and what its channels were judged by."""

    name: str
    factor: float
    units: int
    used: float
    width: float
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Structure:
    """What came of it: the folder `out`, the genotype, its blocks, and the models made of it, the teacher first."""

    out: Path
    budget: Budget
    genotype: Genotype
    blocks: tuple[BlockRow, ...]
    models: tuple[ModelRow, ...]


def learn_structure(settings: StructureSettings, stages: Stages) -> Structure:
    """The whole way from settings to exported models; what an earlier run had finished is not done again.

    The narrow network is within the budget whatever was learnt, else nothing is made of it. It and its baselines, where
    they are wanted (the same without a teacher, one width everywhere), see as many training images: theirs include
    those of the learning.
    Raises a NasKdError for each mistake that a user can make.
    """
    job = prepare(settings.study, InMemoryStorage())
    analysis = job.space.analysis
    goal = Goal(budget=job.budget, factors=block_factors(settings.factors, analysis))
    _check_learnable(analysis)
    materials = gather_whole(job, lambda splits: sum(_epochs(job, settings, splits)), stages)
    learning, refining = _epochs(job, settings, materials.splits)
    learnt, digest = _learn(job, goal, materials, learning, stages)
    genotype = rounded(job, learnt, goal)
    start = Start(build=lambda: narrowed(job, learnt, genotype), digest=digest)
    wanted = WantedModel(role="front", genotype=genotype, space=job.space, epochs=refining, start=start)
    baselines = plain_baselines(job, genotype, learning + refining) if settings.study.refinement.baselines else []
    models = tuple(make_models(job, [wanted, *baselines], materials, stages))
    blocks = tuple(_block_rows(analysis, goal, learnt, genotype))
    result = Structure(out=job.out, budget=job.budget, genotype=genotype, blocks=blocks, models=models)
    _write(result, learnt, settings)
    return result


def block_factors(given: Sequence[tuple[str, float]], analysis: Analysis) -> dict[str, float]:
    """The user's λ_b by block; where several patterns fit, the last one counts. Raises GenotypeError for a pattern that
    fits no block."""
    names, factors = [block.name for block in analysis.blocks], {}
    for pattern, factor in given:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise GenotypeError(
                f"--lambda {pattern}={factor:g} fits no block{nearest(pattern, names)}; blocks are {', '.join(names)}"
            )
        factors.update(dict.fromkeys(fitting, factor))
    return factors


def _check_learnable(analysis: Analysis) -> None:
    if not any(len(block.widths) > 1 for block in analysis.blocks):
        raise GenotypeError(f"there is no width to learn in {analysis.name}: open some in --space, or pin fewer")


def _epochs(job: Job, settings: StructureSettings, splits: Splits) -> tuple[int, int]:
    """Of the learning, and of the training of the narrow network after it."""
    refining = refine_epochs(job, splits.train)
    return settings.learn_epochs or max(1, refining // 2), refining


def _learn(job: Job, goal: Goal, materials: Materials, epochs: int, stages: Stages) -> tuple[LearntWidths, str]:
    """The learnt widths with a digest of all that they depend on, from the cache or learnt now."""
    settings = job.settings
    recipe = replace(
        recipe_of(settings, epochs),
        distill=settings.refinement.distill,
        warmup=_WARMUP,
        eval_epochs=tuple(range(1, epochs + 1)),
    )
    learner = WidthLearner(job.space.base, job.space.analysis, goal)
    _say_sources(learner.scales, job.space.analysis)
    choices = [(block.name, block.choices) for block in job.space.blocks]
    images = images_key(settings.data, materials.splits)
    facts = f"1 {materials.digest} {images} {settings.training.views} {recipe} {goal} {choices}"
    digest = digest_of(facts)
    path = job.cache / f"learnt-{digest}.safetensors"
    with stages.stage("learn widths", epochs) as advance:

        def report(epoch: int, accuracy: float) -> None:
            costs = ", ".join(f"{kind} {share:.0%}" for kind, share in learner.shares().items())
            advance(f"in use: {costs}; val accuracy {100 * accuracy:.1f} %")

        learnt = _fetch(learner, path)
        if learnt is None:
            state = path.with_suffix(".resume")
            val, data, run = materials.splits.val, materials.refine_views, Run(checkpoint=state, sparing=True)
            learnt = learn_widths(learner, data, recipe, val=val, report=report, run=run)
            write_tensors(path, learner.state_dict())
            state.unlink(missing_ok=True)
    return learnt, digest


def _say_sources(scales: ScaleFactors, analysis: Analysis) -> None:
    """Warns of blocks whose channels no norm scales."""
    others = {
        analysis.blocks[segment.block].name: None
        for segment, source in zip(segments_of(analysis), scales.sources, strict=True)
        if source == FILTERS
    }
    if others:
        _logger.warning(
            "no norm scales all channels of %s: there the norms of the filters that write them are learnt from",
            ", ".join(others),
        )


def _fetch(learner: WidthLearner, path: Path) -> LearntWidths | None:
    if not path.exists():
        return None
    try:
        load_exactly(learner, read_tensors(path)[0], path)
    except (OSError, SafetensorError, CheckpointError) as error:
        _logger.warning("the learnt widths %s are damaged (%s): learning them again", path, error)
        return None
    learner.eval()
    return learner.learnt()


def rounded(job: Job, learnt: LearntWidths, goal: Goal) -> Genotype:
    """The widths within the budget that lose the least of what was learnt to be strong."""
    damages = learnt.damages(job.space.analysis, goal.factors)
    try:
        genotype = solve(job.space.table, job.budget, damages)
    except TimeoutError as error:
        raise BudgetError(str(error)) from error
    assert genotype is not None  # the space has found one within the budget
    return genotype


def narrowed(job: Job, learnt: LearntWidths, genotype: Genotype) -> nn.Module:
    """The student with the learnt weights. Which channels stay is decided by the weights before and behind them, as
    everywhere, and not by |γ| alone (docs/results/learnt_widths.md)."""
    return inherit_student(learnt.network, job.space.analysis, genotype)


def _block_rows(analysis: Analysis, goal: Goal, learnt: LearntWidths, genotype: Genotype) -> Iterator[BlockRow]:
    segments = segments_of(analysis)
    for index, block in enumerate(analysis.blocks):
        mine = [number for number, segment in enumerate(segments) if segment.block == index]
        if mine:
            yield BlockRow(
                name=block.name,
                factor=goal.factors.get(block.name, 1.0),
                units=sum(len(segments[number].units) for number in mine),
                used=round(float(learnt.counts[mine].sum()), 2),
                width=genotype[block.name].width,
                sources=tuple(dict.fromkeys(learnt.sources[number] for number in mine)),
            )


def _write(result: Structure, learnt: LearntWidths, settings: StructureSettings) -> None:
    """`structure.json`, which a study may start from, and the table of models."""
    record = {
        "model": settings.study.network.model,
        "budget": str(result.budget),
        "genotype": json.loads(result.genotype.to_json()),
        "digest": result.genotype.digest,
        "in use": {kind: round(share, 4) for kind, share in learnt.shares.items()},
        "lambda": dict(learnt.lambdas),
        "blocks": [asdict(row) for row in result.blocks],
        "command": settings.study.output.command,
        "seed": settings.study.seed,
    }
    write_text(result.out / FILE, json.dumps(record, indent=2) + "\n")
    write_front_csv(result.out / "front.csv", result.models)
