"""How far the ranking of short trainings can be trusted: `python -m nas_kd.rank_check --budget macs=30%`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.torchrun import led, refuse_jobs
from nas_kd.rank_check.arguments import RankSettings, parse_rank_check

if TYPE_CHECKING:
    from rich.console import Console

    from nas_kd.results.rank_rows import RankCheck


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a rank check and returns the exit code: 0 done, 2 a mistake of the user's, 130 interrupted."""
    return guarded(led(lambda arguments: run_check(parse_rank_check(arguments))), argv)


def run_check(settings: RankSettings) -> int:
    """The whole way from settings to results, with progress on standard error and the result on standard output."""
    from nas_kd.progress import Stages, configure, console_for

    refuse_jobs(settings.study.sharing.jobs)
    console = console_for(sys.stderr)
    configure(console, quiet=settings.study.output.quiet, debug=settings.study.output.debug)

    from nas_kd.rank_check.check import run_stages

    result, job = run_stages(settings, Stages(console, quiet=settings.study.output.quiet))
    _conclude(result, job.out, console_for(sys.stdout))
    return 0


def _conclude(result: RankCheck, out: Path, console: Console) -> None:
    from nas_kd.rank_check.page import render_scores

    for group in result.groups:
        console.print(render_scores(group, result), crop=False)
        console.print()
    lines = (
        result.sentence(),
        "over params: how far tau is above that of the number of params; regret: points that the score's first (or the "
        "best of its first 3) is below the best; of truth: seconds beside a long training's",
        f"plots: {out / 'rank_check.html'}    numbers: {out / 'rank_check.json'}",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
