"""One small model, trained online with its peers or beside a teacher: `python -m nas_kd.distill MODEL --online`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nas_kd.arguments.distill import DistillSettings, parse_distill
from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.torchrun import led
from nas_kd.budget import short

if TYPE_CHECKING:
    from rich.table import Table

    from nas_kd.pipeline.distillation import Distilled


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a model and returns the exit code: 0 done, 2 a mistake of the user's, 130 interrupted."""
    return guarded(led(lambda arguments: run_distill(parse_distill(arguments))), argv)


def run_distill(settings: DistillSettings) -> int:
    """The whole way from settings to an exported folder, progress on standard error, the result on standard output."""
    from nas_kd.progress import Stages, configure, console_for

    console = console_for(sys.stderr)
    configure(console, quiet=settings.quiet, debug=settings.debug)

    from nas_kd.pipeline.distillation import FILE, distill

    result = distill(settings, Stages(console, quiet=settings.quiet))
    out = console_for(sys.stdout)
    out.print(_table(result), crop=False)
    for line in (
        f"load it: import timm, nas_kd.models; timm.create_model({f'local-dir:{result.folder}'!r}, pretrained=True)",
        f"numbers: {result.folder.parent / FILE}",
    ):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _table(result: Distilled) -> Table:
    """The chosen model, then every peer and the teacher that they built."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("model", "val %", "test %", "params", "MACs", "path"):
        numeric = heading not in ("model", "path")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in _rows(result):
        table.add_row(*map(Text, row))
    return table


def _rows(result: Distilled) -> Iterator[tuple[str, ...]]:
    refined, cost = result.refined, result.cost

    def scores(val: float, test: float) -> tuple[str, str]:
        return f"{100 * val:.1f}" if result.quotes_val else "-", f"{100 * test:.1f}"

    costs = (short(cost.params), short(cost.macs))
    yield (result.folder.name, *scores(refined.val_accuracy, refined.test_accuracy), *costs, str(result.folder))
    for number, peer in enumerate(refined.peers[:-1], start=1):
        chosen = " (chosen by val)" if number == refined.best + 1 else ""
        yield (f"  peer {number}{chosen}", *scores(peer.val, peer.test), *costs, "")
    for peer in refined.peers[-1:]:
        yield ("  online teacher", *scores(peer.val, peer.test), "", "", "")


if __name__ == "__main__":
    sys.exit(main())
