"""Joins a running study from any machine: `python -m nas_kd.worker --storage URL --study-name NAME`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.worker import WorkerSettings, parse_worker


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a worker and returns the exit code: 0 the study has what it wants, 2 a mistake, 130 interrupted."""
    return guarded(lambda arguments: run_worker(parse_worker(arguments)), argv)


def run_worker(settings: WorkerSettings) -> int:
    """Trains trials until the study has what it wants, then models of its results."""
    from nas_kd.progress import Stages, configure, console_for

    console = console_for(sys.stderr)
    configure(console, quiet=settings.quiet, debug=settings.debug)
    if settings.leash:
        from nas_kd.search.signals import follow_parent

        threading.Thread(target=follow_parent, daemon=True).start()

    from nas_kd.pipeline.elsewhere import take_models
    from nas_kd.workers.joining import join

    stages = Stages(console, quiet=settings.quiet)
    trials = 0 if settings.models else join(settings, stages)
    models = take_models(settings, stages) if settings.models or not settings.leash else 0
    if not settings.quiet:
        of_these = f"{trials} of its trials were this worker's" + (f", and {models} of its models" if models else "")
        console_for(sys.stdout).print(f"the study has what it wants; {of_these}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
