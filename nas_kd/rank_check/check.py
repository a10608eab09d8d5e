"""The stages of a rank check: genotypes in a band, a truth and short trainings of each, and how well scores agree."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from optuna.storages import InMemoryStorage

from nas_kd.budget import Cost
from nas_kd.errors import TrainingError
from nas_kd.files.atomic import write_text
from nas_kd.files.records import Record
from nas_kd.genotype import Genotype
from nas_kd.pipeline.summary import environment_of
from nas_kd.preparation.job import Job, prepare
from nas_kd.preparation.materials import gather
from nas_kd.preparation.opening import space_of
from nas_kd.progress import Stages
from nas_kd.rank_check.arguments import RankSettings
from nas_kd.rank_check.band import draw_in_band, near_optimum
from nas_kd.rank_check.context import FRESH, RUNGS, Check, CheckContext, context_of
from nas_kd.rank_check.measuring import measure_genotypes
from nas_kd.rank_check.page import render_check
from nas_kd.rank_check.parts import parts_of, records_in
from nas_kd.rank_check.statistics import agreement, allowing_for_damage, allowing_for_size, tau_difference
from nas_kd.results.rank_rows import FILE, GroupRows, RankCheck, ScoreRow
from nas_kd.search.additive import total
from nas_kd.search.starts import prior_damages

SCORE = "accuracy"  # what a study ranks by
SIZED = ", size allowed for"
DAMAGED = ", damage allowed for"
_DAMAGE = "damage (nMSE)"
_LEAST_ERROR = 1e-4  # of an accuracy that cannot be told from 1
_LEAST = 3  # genotypes of a group that an order can be spoken of
# scores of which less is better
_LOWER = ("damage", "sum of training", "training losses", "distillation", "error", "cross-entropy")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Entry:
    """One genotype and what is known of it: `records` by part, `damages` by name."""

    genotype: Genotype
    records: Mapping[str, Record]
    damages: Mapping[str, float]

    @property
    def truth(self) -> float:
        """NaN where the long training failed."""
        return float(self.records["truth"].get("accuracy", math.nan))


def run_stages(settings: RankSettings, stages: Stages) -> tuple[RankCheck, Job]:
    """Runs every stage, or what is left of them, and writes `rank_check.json` and `rank_check.html`.

    What was measured of a genotype is kept in `rank_check.jsonl` as it comes, so that a killed check goes on and a
    larger one measures what is missing.
    """
    job = prepare(settings.study, InMemoryStorage())
    # before anything is trained: a band without genotypes and records that cannot be read must fail at once
    records = records_in(job.out)
    groups: dict[str, Sequence[Genotype]] = {}
    if settings.genotypes:
        table, count, seed = job.space.table, settings.genotypes, settings.study.seed
        groups["random"] = draw_in_band(table, job.budget, settings.band, count, seed)
    job, materials = gather(job, stages)
    context = context_of(job, settings, materials)
    check = Check(job=job, materials=materials, context=context)
    if settings.near:
        groups["near"] = near_optimum(
            context.space.table,
            job.budget,
            context.space.damages(),
            band=settings.band,
            count=settings.near,
            seed=settings.study.seed,
        )
    genotypes = list(dict.fromkeys(genotype for group in groups.values() for genotype in group))
    measured = measure_genotypes(check, genotypes, records, stages)
    with stages.stage("ranking"):
        entries = {name: _entries(context, measured, groups[name]) for name in groups}
        result = _conclude(check, entries)
    write_text(job.out / FILE, result.to_json())
    write_text(job.out / "rank_check.html", render_check(result))
    return result, job


def _entries(
    context: CheckContext, measured: Mapping[tuple[str, str], Record], genotypes: Sequence[Genotype]
) -> tuple[_Entry, ...]:
    """The genotypes of a group whose truth is known. Raises TrainingError when they are too few."""
    table = context.space.table
    if context.library is None:
        damages = {"damage (prior)": prior_damages(table)}
    else:
        damages = {f"damage ({name})": context.library.damages(kind) for name, kind in (("KL", "kl"), ("nMSE", "nmse"))}
    names = [part.name for part in parts_of(context)]
    entries = [
        _Entry(
            genotype=genotype,
            records={name: measured[name, genotype.digest] for name in names},
            damages={name: float(total(kind, table.indices(genotype)[None])[0]) for name, kind in damages.items()},
        )
        for genotype in genotypes
    ]
    known = tuple(entry for entry in entries if math.isfinite(entry.truth))
    if len(known) < _LEAST:
        raise TrainingError(
            f"only {len(known)} of {len(entries)} long trainings ended with an accuracy, too few to rank: lower --lr"
        )
    return known


Found = tuple[tuple[str, str, int], float, float]  # (name, start, steps), value, seconds


def _scores(context: CheckContext, entry: _Entry) -> Iterator[Found]:
    """Every score of a genotype."""
    cost = context.space.table.cost(entry.genotype)
    yield ("params", "", 0), cost.params, 0.0
    yield ("MACs", "", 0), cost.macs, 0.0
    for name, damage in entry.damages.items():
        yield (name, "", 0), damage, 0.0
    for name, found in entry.records["zero-cost"].items():
        if name != "genotype":
            yield (name, FRESH, 0), *found
    for start in context.starts:
        before = 0.0
        for rung in entry.records[start].get("rungs", ()):
            yield from _rung_scores(start, rung, before, cost, entry.damages.get(_DAMAGE))
            before = rung["loss"]


def _rung_scores(start: str, rung: Record, before: float, cost: Cost, damage: float | None) -> Iterator[Found]:
    """The scores of a genotype at a rung; `before` is the sum of the losses at the rung below, `damage` the library's
    for the whole genotype."""
    steps, training = rung["steps"], rung["train_seconds"]
    if steps:
        yield ("sum of training losses", start, steps), rung["loss"], training
        yield ("training losses since the last rung", start, steps), rung["loss"] - before, training
    looked = training + rung["look_seconds"]
    yield (SCORE, start, steps), rung["accuracy"], looked
    yield ("distillation loss", start, steps), rung["distillation"], looked
    error = max(1 - rung["accuracy"], _LEAST_ERROR)
    yield (f"error{SIZED}", start, steps), allowing_for_size(error, cost.params), looked
    yield (f"distillation loss{SIZED}", start, steps), allowing_for_size(rung["distillation"], cost.params), looked
    if damage is not None:
        yield (f"error{DAMAGED}", start, steps), allowing_for_damage(error, damage), looked
    yield ("cross-entropy", start, steps), rung["cross_entropy"], looked


def _conclude(check: Check, groups: Mapping[str, Sequence[_Entry]]) -> RankCheck:
    job, settings, context = check.job, check.context.settings, check.context
    batch_size = settings.study.training.batch_size
    library = context.library
    return RankCheck(
        model=settings.study.network.model,
        teacher=check.materials.digest,
        data=check.materials.splits.digest,
        space=space_of(settings.study.choices),
        budget=str(job.budget),
        band=settings.band,
        seed=settings.study.seed,
        command=settings.study.output.command,
        truth_steps=context.truth.steps(batch_size) * context.truth_portions,
        truth_images=context.truth.count * context.truth_portions,
        library_seconds=None if library is None else library.seconds,
        default=(SCORE, context.starts[-1], context.portions.steps(batch_size) * RUNGS[-1]),
        groups=tuple(_group(name, context, entries) for name, entries in groups.items()),
        environment=environment_of(job),
    )


def _group(name: str, context: CheckContext, entries: Sequence[_Entry]) -> GroupRows:
    costs = [context.space.table.cost(entry.genotype) for entry in entries]
    found = [{key: (value, seconds) for key, value, seconds in _scores(context, entry)} for entry in entries]
    truth = tuple(entry.truth for entry in entries)
    nothing = (math.nan, math.nan)
    rows = []
    for key in dict.fromkeys(key for scores in found for key in scores):
        values, seconds = zip(*(scores.get(key, nothing) for scores in found), strict=True)
        rows.append(_row(key, values, truth, float(np.nanmean(seconds)), [cost.params for cost in costs]))
    return GroupRows(
        name=name,
        digests=tuple(entry.genotype.digest for entry in entries),
        genotypes=tuple(entry.genotype.to_json() for entry in entries),
        params=tuple(cost.params for cost in costs),
        macs=tuple(cost.macs for cost in costs),
        truth=truth,
        truth_seconds=float(np.mean([entry.records["truth"]["seconds"] for entry in entries])),
        scores=tuple(sorted(rows, key=lambda row: -row.tau if math.isfinite(row.tau) else math.inf)),
    )


def _row(
    key: tuple[str, str, int],
    values: tuple[float, ...],
    truth: Sequence[float],
    seconds: float,
    params: Sequence[int],
) -> ScoreRow:
    name, start, steps = key
    lower = name.startswith(_LOWER)
    scores = [-value if lower else value for value in values]
    agreed = agreement(scores, truth, seed=0)
    return ScoreRow(
        name=name,
        start=start,
        steps=steps,
        lower=lower,
        values=tuple(map(float, values)),
        tau=agreed.tau,
        low=agreed.low,
        high=agreed.high,
        over_params=tau_difference(scores, params, truth, seed=0),
        regrets=agreed.regrets,
        seconds=seconds,
    )
