"""Measures the genotypes of a rank check: here, and by other processes and machines where that pays."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from nas_kd.costs.latency import limited_threads
from nas_kd.files.records import Record, Records
from nas_kd.genotype import Genotype
from nas_kd.pipeline.helpers import places
from nas_kd.progress import Stages
from nas_kd.rank_check.context import Check
from nas_kd.rank_check.genotypes_elsewhere import can_be_shared, is_asked_for, measure_with_workers
from nas_kd.rank_check.parts import Measuring, parts_of
from nas_kd.workers.pool import share_of_threads

WORTH = 60.0  # predicted seconds must be left of it: another process takes a dozen to begin
_logger = logging.getLogger(__name__)


def measure_genotypes(
    check: Check, genotypes: Sequence[Genotype], records: Records, stages: Stages
) -> dict[tuple[str, str], Record]:
    """Each part of each genotype, by (part, digest): from the records, or measured now."""
    own = Measuring(parts=parts_of(check.context), records=records)
    missing = own.missing(genotypes)
    shareable, asked = can_be_shared(check), is_asked_for(check.job)
    if asked and not shareable:
        _logger.warning(
            "the genotypes are measured by this process alone: workers cannot have its images or its teacher"
        )
    asked = asked and shareable
    count = places(check.job, len(missing)) if shareable else 1
    with (
        stages.stage("training", max(1, len(missing))) as advance,
        limited_threads(None if count == 1 else share_of_threads(count)),
    ):
        started = time.monotonic()
        for genotype in [] if asked else missing[:1]:  # tells what the others take
            own.one(genotype, advance)
        # dearest first: so all processes end at about the same time
        rest = sorted(own.missing(missing), key=lambda genotype: -check.context.space.cost(genotype).macs)
        if rest and (asked or (count > 1 and (time.monotonic() - started) * len(rest) >= WORTH)):
            measure_with_workers(check, own, rest, count, advance)
        for genotype in own.missing(rest):  # also what one had taken that ended
            own.one(genotype, advance)
    found = {genotype: own.found(genotype) for genotype in genotypes}
    for genotype in missing:
        _warn_of_failures(genotype, found[genotype])
    return {(name, genotype.digest): record for genotype in genotypes for name, record in found[genotype].items()}


def _warn_of_failures(genotype: Genotype, records: Mapping[str, Record]) -> None:
    for name, record in records.items():
        if "failed" in record:
            _logger.warning("%s of genotype %s: %s", name, genotype.digest, record["failed"])
