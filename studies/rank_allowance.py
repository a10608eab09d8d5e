"""How much size is to be allowed for: τ of a short training's loss times params to a negative power, over the power.

    python studies/rank_allowance.py RESULTS/rank_check.json [MORE …]

Each file is what `python -m nas_kd.rank_check` left in its output folder; nothing is trained. The best power of one
base says nothing: one power must be good on all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nas_kd.rank_check.statistics import agreement
from nas_kd.results.rank_rows import GroupRows, RankCheck, ScoreRow, read_check, share

POWERS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
LOSSES = ("accuracy", "distillation loss")  # of an accuracy, the error


def tables(checks: list[RankCheck]) -> Iterator[str]:
    """A table per check and group, line by line."""
    yield "## How much size is to be allowed for\n"
    yield "τ of loss · params^-power, in brackets the regret of the first in points, over the power.\n"
    for check in checks:
        for group in check.groups:
            yield f"### {check.model}, {check.budget}: {len(group.truth)} {group.name}\n"
            heads = ("score", "steps", "of the truth", *(f"{power:g}" for power in POWERS))
            yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
            for row in group.scores:
                if row.name in LOSSES and row.start == check.default[1]:
                    yield f"| {' | '.join(cells(row, group))} |"
            yield ""


def cells(row: ScoreRow, group: GroupRows) -> Iterator[str]:
    """τ and the regret of the first, for each power."""
    yield from ("error" if row.name == "accuracy" else row.name, str(row.steps), share(row.seconds, group))
    values = np.array(row.values)
    losses = np.maximum(1 - values, 1e-4) if row.name == "accuracy" else values
    for power in POWERS:
        found = agreement(-losses * np.array(group.params) ** -power, group.truth, seed=0)
        yield f"{found.tau:.2f} ({100 * found.regrets[0]:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    checks = [check for file in parser.parse_args().files if (check := read_check(file)) is not None]
    if not checks:
        sys.exit("there is no such file")
    print("\n".join(tables(checks)))


if __name__ == "__main__":
    main()
