"""Measures the genotypes of a rank check: here, and by processes beside it where that pays."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nas_kd.costs.latency import limited_threads
from nas_kd.genotype import Genotype
from nas_kd.pipeline.helpers import Claims, helping, pass_over, places
from nas_kd.preparation.job import Job, recipe_of
from nas_kd.preparation.materials import Materials
from nas_kd.preparation.records import Record, Records
from nas_kd.progress import Advance, Stages
from nas_kd.rank_check.arguments import RankSettings
from nas_kd.rank_check.parts import RUNGS, Ground, Part, parts_of, truth_portions
from nas_kd.rank_check.portions import Portions
from nas_kd.rank_check.validation import validation_of
from nas_kd.search.space import Space
from nas_kd.workers.crew import share_of_threads

STAGE = "genotypes"
HELPER = "nas_kd.rank_check.helper"
WORTH = 60.0  # predicted seconds must be left of it: another process takes a dozen to begin
_logger = logging.getLogger(__name__)


def records_of(job: Job) -> Records:
    """What was measured of a check's genotypes. Raises OutputError when that cannot be read."""
    return Records(job.out / "rank_check.jsonl")


def ground_of(job: Job, settings: RankSettings, materials: Materials) -> Ground:
    """What all trainings of a check share."""
    space: Space[nn.Module] = copy.copy(job.space)
    space.budget = job.budget.scaled(1 + settings.band)  # half of the band is over the budget, and nothing is exported
    study = job.settings
    truth_count, truth_number = truth_portions(settings.truth_images, study.batch_size)
    return Ground(
        job=job,
        materials=materials,
        space=space,
        portions=Portions(materials.refine_views, settings.proxy_images // RUNGS[-1], study.seed),
        truth=Portions(materials.refine_views, truth_count, study.seed),
        truth_portions=truth_number,
        # other work on the same cores must not change what a score costs beside a truth
        clock=time.process_time if job.device.type == "cpu" else time.monotonic,
        every_start=settings.starts == "all",
        validation=validation_of(
            materials.splits.val,
            materials.teacher.network,
            count=settings.val_images,
            temperature=recipe_of(study, 1).temperature,
            seed=study.seed,
        ),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measuring:
    """What is measured of genotypes, its `parts`, and the `records` that keep it."""

    parts: tuple[Part, ...]
    records: Records

    def one(self, genotype: Genotype, tell: Advance) -> None:
        """Measures what is not known of a genotype."""
        for part in self.parts:
            if (key := _key(part, genotype)) not in self.records:
                self.records[key] = {"genotype": genotype.to_json(), **part.measure(genotype)}
        truth = self.records[_key(self.parts[-1], genotype)]
        tell(f"{genotype.digest}: {100 * truth.get('accuracy', math.nan):.1f} %")

    def missing(self, genotypes: Sequence[Genotype]) -> list[Genotype]:
        """Those of which a part is not known."""
        return [own for own in genotypes if any(_key(part, own) not in self.records for part in self.parts)]

    def found(self, genotype: Genotype) -> dict[str, Record]:
        """What is known of a genotype, by part."""
        return {part.name: self.records[_key(part, genotype)] for part in self.parts}


def _key(part: Part, genotype: Genotype) -> str:
    return f"{part.name}/{part.key}/{genotype.digest}"


def measure(
    ground: Ground, settings: RankSettings, genotypes: Sequence[Genotype], records: Records, stages: Stages
) -> dict[tuple[str, str], Record]:
    """Each part of each genotype, by (part, digest): from the records, or measured now."""
    own = Measuring(parts=parts_of(ground), records=records)
    missing = own.missing(genotypes)
    count = places(ground.job, len(missing))
    with (
        stages.stage("training", max(1, len(missing))) as advance,
        limited_threads(None if count == 1 else share_of_threads(count)),
    ):
        started = time.monotonic()
        for genotype in missing[:1]:  # tells what the others take
            own.one(genotype, advance)
        rest = missing[1:]
        if count > 1 and (time.monotonic() - started) * len(rest) >= WORTH:
            with helping(ground.job, HELPER, _without_study(settings)) as helpers:
                claims = helpers.share(STAGE, {"genotypes": [genotype.to_json() for genotype in rest]}, count)
                claims.work(rest, own.one, advance)
                claims.wait(advance)
        for genotype in own.missing(rest):  # also what one had taken that ended
            own.one(genotype, advance)
    found = {genotype: own.found(genotype) for genotype in genotypes}
    for genotype in missing:
        _warn_of_failures(genotype, found[genotype])
    return {(name, genotype.digest): record for genotype in genotypes for name, record in found[genotype].items()}


def measure_shared(ground: Ground, plan: Mapping[str, Any], claims: Claims) -> None:
    """A helper's part of the genotypes of a check."""
    measuring = Measuring(parts=parts_of(ground), records=records_of(ground.job))
    claims.work([Genotype.from_json(own) for own in plan["genotypes"]], measuring.one, pass_over)


def _without_study(settings: RankSettings) -> dict[str, Any]:
    """What a check is asked beside its study, whose settings a helper finds in another place."""
    return {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name != "study"
    }


def _warn_of_failures(genotype: Genotype, records: Mapping[str, Record]) -> None:
    for name, record in records.items():
        if "failed" in record:
            _logger.warning("%s of genotype %s: %s", name, genotype.digest, record["failed"])
