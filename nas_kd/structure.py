"""How wide each block must be, learnt while it is distilled: `python -m nas_kd.structure --budget macs=50%`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.torchrun import led
from nas_kd.budget import kinds_of
from nas_kd.learnt_widths.arguments import StructureSettings, parse_structure

if TYPE_CHECKING:
    from rich.table import Table

    from nas_kd.learnt_widths.pipeline import Structure


def main(argv: Sequence[str] | None = None) -> int:
    """Learns a structure and returns the exit code: 0 done, 2 a mistake of the user's, 130 interrupted."""
    return guarded(led(lambda arguments: run_structure(parse_structure(arguments))), argv)


def run_structure(settings: StructureSettings) -> int:
    """The whole way from settings to exported folders, progress on standard error, the result on standard output."""
    from nas_kd.progress import Stages, configure, console_for

    study = settings.study.output
    console = console_for(sys.stderr)
    configure(console, quiet=study.quiet, debug=study.debug)

    from nas_kd.learnt_widths.pipeline import FILE, learn_structure
    from nas_kd.results.table import render_table

    result = learn_structure(settings, Stages(console, quiet=study.quiet))
    out = console_for(sys.stdout)
    out.print(_widths(result), crop=False)
    out.print(render_table(result.models, folder=result.out, kinds=kinds_of(result.budget)), crop=False)
    name = f"local-dir:{result.out}/MODEL"
    for line in (
        f"load one: import timm, nas_kd.models; timm.create_model({name!r}, pretrained=True)",
        f"numbers: {result.out / FILE}    table: {result.out / 'front.csv'}",
        f"begin a search there: python -m nas_kd.study … --start-from {shlex.quote(str(result.out / FILE))}",
    ):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _widths(result: Structure) -> Table:
    """What was learnt of each block, and the width that it got."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("block", "lambda", "channels", "in use", "width", "by"):
        numeric = heading not in ("block", "by")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in result.blocks:
        table.add_row(
            row.name, f"{row.factor:g}", str(row.units), f"{row.used:.1f}", f"{row.width:g}", " and ".join(row.sources)
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
