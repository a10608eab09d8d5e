"""The main command: `python -m nas_kd.study --budget params=1M`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.study import Settings, parse_study
from nas_kd.arguments.torchrun import led, refuse_jobs
from nas_kd.budget import kinds_of
from nas_kd.errors import without_password

if TYPE_CHECKING:
    from rich.console import Console

    from nas_kd.results.rows import StudySummary


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a study and returns the exit code: 0 done, 2 a mistake of the user's, 130 interrupted."""
    return guarded(led(lambda arguments: run_study(parse_study(arguments))), argv)


def run_study(settings: Settings) -> int:
    """The whole way from settings to results, with progress on standard error and the result on standard output."""
    from nas_kd.progress import Stages, configure, console_for

    console = console_for(sys.stderr)
    configure(console, quiet=settings.output.quiet, debug=settings.output.debug)
    refuse_jobs(settings.sharing.jobs)

    from nas_kd import pipeline

    stages = Stages(console, quiet=settings.output.quiet)
    job = pipeline.prepare(settings, stages=stages)
    summary = pipeline.run(job, stages)
    _conclude(summary, job.out, settings, console_for(sys.stdout))
    return 0


def _conclude(summary: StudySummary, out: Path, settings: Settings, console: Console) -> None:
    """Prints the table of models and where everything is."""
    from nas_kd.results.advice import advice, overtaken
    from nas_kd.results.report import beside_uniform, headline
    from nas_kd.results.table import render_table
    from nas_kd.search.storage import sqlite_url

    console.print(render_table(summary.models, folder=out, kinds=kinds_of(summary.budget)), crop=False)
    storage = without_password(settings.sharing.storage or sqlite_url(out / "study.db"))
    artifacts = settings.sharing.artifacts or str(out / "artifacts")
    shown = shlex.join(["optuna-dashboard", storage, *([] if "://" in artifacts else ["--artifact-dir", artifacts])])
    lines = (
        headline(summary),
        *filter(None, [beside_uniform(summary.models), overtaken(summary), advice(summary)]),
        f"load one: import timm, nas_kd.models; timm.create_model({f'local-dir:{out}/MODEL'!r}, pretrained=True)",
        f"report: {out / 'report.html'}    table: {out / 'front.csv'}",
        f"look closer: {shown}",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
