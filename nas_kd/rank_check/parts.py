"""What a rank check measures of one genotype: a truth, short trainings from several starts, and zero-cost scores."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nas_kd.data.images import normalise
from nas_kd.errors import TrainingError
from nas_kd.files.digests import digest_of
from nas_kd.files.records import Record, Records
from nas_kd.genotype import Genotype
from nas_kd.progress import Advance
from nas_kd.rank_check.context import FRESH, LIBRARY, RUNGS, CheckContext
from nas_kd.rank_check.validation import Look
from nas_kd.rank_check.zero_cost import ZERO_COST
from nas_kd.training.evaluation import LOOK_CALIBRATION, evaluate, recalibrate
from nas_kd.training.loop import fit, student_task, train

_VERSION = 1  # of what the records hold
_ZERO_COST_IMAGES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One thing to measure of every genotype, and a key that names all that it depends on but the genotype."""

    name: str
    key: str
    measure: Callable[[Genotype], Record]


def records_in(out: Path) -> Records:
    """What was measured of a check's genotypes. Raises OutputError when that cannot be read."""
    return Records(out / "rank_check.jsonl")


def parts_of(context: CheckContext) -> tuple[Measurement, ...]:
    """What is measured of each genotype; the truth comes last."""
    shared = f"{_VERSION} {context.teacher} {context.images} "
    shared += f"{context.study.seed} {getattr(context.portions.views, 'count', 0)} "
    parts = [Measurement(name="zero-cost", key=_digest(shared), measure=functools.partial(_zero_cost, context))]
    for start in context.starts:
        about = (
            f"{start} {context.portions.count} {context.proxy_recipe(start)} {len(context.validation.images)} "
            f"{_library_key(context, start)} {LOOK_CALIBRATION}"
        )
        measure = functools.partial(_proxy, context, start)
        parts.append(Measurement(name=start, key=_digest(shared + about), measure=measure))
    start = context.starts[-1]
    recipe = context.recipe(start, context.truth_portions)
    about = f"truth {start} {context.truth.count} {recipe} {_library_key(context, start)}"
    return (*parts, Measurement(name="truth", key=_digest(shared + about), measure=functools.partial(_truth, context)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measuring:
    """What is measured of genotypes, its `parts`, and the `records` that keep it."""

    parts: tuple[Measurement, ...]
    records: Records

    def one(self, genotype: Genotype, tell: Advance) -> None:
        """Measures what is not known of a genotype."""
        for part in self.parts:
            if (key := _key(part, genotype)) not in self.records:
                self.records[key] = {"genotype": genotype.to_json(), **part.measure(genotype)}
        tell(self.words(genotype))

    def words(self, genotype: Genotype) -> str:
        """What there is to say of a genotype that was measured."""
        return f"{genotype.digest}: {100 * self.truth(genotype):.1f} %"

    def truth(self, genotype: Genotype) -> float:
        """The accuracy after the long training; NaN where that failed."""
        return float(self.records[_key(self.parts[-1], genotype)].get("accuracy", math.nan))

    def missing(self, genotypes: Sequence[Genotype]) -> list[Genotype]:
        """Those of which a part is not known."""
        return [own for own in genotypes if any(_key(part, own) not in self.records for part in self.parts)]

    def found(self, genotype: Genotype) -> dict[str, Record]:
        """What is known of a genotype, by part."""
        return {part.name: self.records[_key(part, genotype)] for part in self.parts}

    def take(self, genotype: Genotype, found: Mapping[str, Record]) -> None:
        """Keeps what another process measured of a genotype, by part."""
        for part in self.parts:
            if part.name in found:
                self.records[_key(part, genotype)] = found[part.name]


def _key(part: Measurement, genotype: Genotype) -> str:
    return f"{part.name}/{part.key}/{genotype.digest}"


def _library_key(context: CheckContext, start: str) -> str:
    return context.library.folder.name if start == LIBRARY and context.library is not None else ""


def _digest(text: str) -> str:
    return digest_of(text, 12)


def _truth(context: CheckContext, genotype: Genotype) -> Record:
    """The accuracy on all validation images after a long training."""
    started = context.clock()
    start = context.starts[-1]
    student = context.student(genotype, start)
    try:
        train(student, context.truth, context.recipe(start, context.truth_portions))
    except TrainingError as error:
        return {"failed": str(error)}
    accuracy = evaluate(student, context.val)
    return {"accuracy": accuracy, "seconds": round(context.clock() - started, 3)}


class _RungLooks:
    """Looks at a network and keeps what was seen, and when: the time spent looking is no training."""

    def __init__(self, context: CheckContext) -> None:
        self.validation, self.clock = context.validation, context.clock
        self.calibration = context.portions.sample(LOOK_CALIBRATION)
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


def _proxy(context: CheckContext, start: str, genotype: Genotype) -> Record:
    """A short training with a schedule of its own, looked at on its rungs; and at its start where it inherits."""
    watch = _RungLooks(context)
    student = context.student(genotype, start)
    if start != FRESH:
        watch(student)
    recipe = dataclasses.replace(context.proxy_recipe(start), eval_epochs=RUNGS)
    try:
        result = fit(student_task(student, recipe, watch), context.portions, recipe)
    except TrainingError as error:
        return {"failed": str(error)}
    rungs = RUNGS if start == FRESH else (0, *RUNGS)
    steps = context.portions.steps(recipe.batch_size)
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


def _zero_cost(context: CheckContext, genotype: Genotype) -> Record:
    """Each zero-cost score of the untrained student, with its seconds."""
    student = context.student(genotype, FRESH)
    images = context.portions.sample(_ZERO_COST_IMAGES)
    pixels = normalise(images.pixels, images.mean, images.std, context.device)
    labels = images.labels.to(context.device)
    record: Record = {}
    for name, score in ZERO_COST.items():
        with torch.random.fork_rng():  # dropout
            torch.manual_seed(context.study.seed)
            started = context.clock()
            record[name] = [score(student, pixels, labels), round(context.clock() - started, 4)]
    return record
