"""Rank checks as a page of results.

    python studies/rank_table.py RESULTS/rank_check.json [MORE …] > docs/results/rank_check.md

Each file is what `python -m nas_kd.rank_check` left in its output folder; its own command stands above its tables.
"""

from __future__ import annotations

import argparse
import datetime
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from nas_kd.results.rank_rows import GroupRows, RankCheck, ScoreRow, interval, read_check, share

COLUMNS = ("score", "start", "steps", "τ [90 %]", "τ above that of params", "regret", "of the first 3", "of the truth")
NOTES = """Kendall's τ-b between each score and the truth, the accuracy on all validation images after a long
distillation from the library, with bootstrap intervals over the genotypes. Regret: how many points of accuracy the
genotype that a score puts first, or the best of its first three, is below the best one. The last column is what a
candidate costs beside a long training; the library, which is built once, is left out. Steps are of one batch; a short
training has a schedule of its own and is looked at on its way, batch norms recalibrated before each look.
`size allowed for`: loss · params^-0.15; `damage allowed for`: loss · (the library's nMSE)^0.2."""


def page(checks: list[RankCheck]) -> Iterator[str]:
    """The page, line by line."""
    yield "# How far short trainings can be trusted\n"
    yield f"{NOTES}\n"
    for check in checks:
        yield f"## {check.model}, {check.budget}\n"
        yield f"`{command(check)}`, seed {check.seed}\n"
        facts = [f"{name} {value}" for name, value in check.environment]
        yield "; ".join([*facts, str(datetime.date.today())]) + ".\n"
        library = "" if check.library_seconds is None else f" The library took {check.library_seconds:.0f} s."
        truth = f"A truth is {check.truth_images:,} images, {check.groups[0].truth_seconds:.0f} s."
        yield f"{check.sentence()} {truth}{library}\n"
        for group in check.groups:
            yield from table(group)


def table(group: GroupRows) -> Iterator[str]:
    """The scores of a group, the best first."""
    truth, params = group.truth, group.params
    kind = {"random": "random genotypes", "near": "genotypes near the optimum"}[group.name]
    yield f"### {len(truth)} {kind}\n"
    yield f"{100 * min(truth):.1f} to {100 * max(truth):.1f} % in truth, {min(params):,} to {max(params):,} params.\n"
    yield f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    for row in group.scores:
        yield f"| {' | '.join(cells(row, group))} |"
    yield ""


def cells(row: ScoreRow, group: GroupRows) -> tuple[str, ...]:
    """One line of a table."""
    low, high = row.over_params
    above = "" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"
    regrets = (f"{100 * regret:.2f}" for regret in row.regrets)
    cost = share(row.seconds, group) if row.seconds else "–"
    return (row.name, row.start or "–", str(row.steps or "–"), interval(row), above, *regrets, cost)


def command(check: RankCheck) -> str:
    """The command that shows it again, without this machine's folders."""
    return re.sub(r"(?<=\s)\S*/([^/\s]+)", r"\1", check.command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    checks = []
    for file in parser.parse_args().files:
        check = read_check(file)
        if check is None:
            sys.exit(f"there is no {file}")
        checks.append(check)
    print("\n".join(page(checks)))


if __name__ == "__main__":
    main()
