"""Joins a running study from any machine: `python -m nas_kd.worker --storage URL --study-name NAME`."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.worker import GENOTYPES, LIBRARY, MODELS, PARTS, TRIALS, WorkerSettings, parse_worker

if TYPE_CHECKING:
    from nas_kd.progress import Stages


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a worker and returns the exit code: 0 the study has what it wants, 2 a mistake, 130 interrupted."""
    return guarded(lambda arguments: run_worker(parse_worker(arguments)), argv)


def run_worker(settings: WorkerSettings) -> int:
    """Makes blocks of the library of a study that begins, trains trials until it has what it wants, then models of its
    results; or measures genotypes of a rank check."""
    from nas_kd.progress import Stages, configure, console_for

    console = console_for(sys.stderr)
    configure(console, quiet=settings.quiet, debug=settings.debug)
    if settings.leash:
        from nas_kd.search.signals import follow_parent

        threading.Thread(target=follow_parent, daemon=True).start()
    did = _work(settings, Stages(console, quiet=settings.quiet))
    if not settings.quiet:
        console_for(sys.stdout).print(did)
    return 0


def _work(settings: WorkerSettings, stages: Stages) -> str:
    """Does the parts of the work that are asked for; says what was this worker's."""
    from nas_kd.pipeline.blocks_elsewhere import take_blocks
    from nas_kd.pipeline.models_elsewhere import take_models
    from nas_kd.rank_check.genotypes_elsewhere import take_genotypes
    from nas_kd.workers.joining import join

    began, parts = time.monotonic(), (*PARTS, GENOTYPES) if settings.part is None else (settings.part,)
    blocks = take_blocks(settings, stages) if LIBRARY in parts else None
    if blocks is None and GENOTYPES in parts:
        genotypes = take_genotypes(settings, stages)
        if genotypes is not None or settings.part is not None:
            return f"the rank check has its genotypes; {genotypes or 0} of them were this worker's"
    waited = int(time.monotonic() - began)
    # a study whose blocks were at hand is about to begin
    left = max(0, settings.wait - waited) if blocks is None else max(settings.wait, settings.grace_period)
    trials = join(dataclasses.replace(settings, wait=left), stages) if TRIALS in parts else 0
    models = take_models(settings, stages) if MODELS in parts else 0
    words = {"blocks of its library": blocks or 0, "models": models}
    more = "".join(f", {count} of its {what}" for what, count in words.items() if count)
    return f"the study has what it wants; {trials} of its trials were this worker's{more}"


if __name__ == "__main__":
    sys.exit(main())
