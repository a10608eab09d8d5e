"""What a budget that no student meets could be met by: the smallest costs with choices that are not open yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from nas_kd.analysis.structure import Analysis
from nas_kd.budget import MEASURED, amount
from nas_kd.costs.cost_table import cost_table
from nas_kd.costs.verification import analyse
from nas_kd.errors import ModelError
from nas_kd.genotype import Genotype
from nas_kd.search.options import Options, restrict

Measured = Callable[[str, Analysis, Genotype], int]  # a kind of cost of a whole student


def further_options(options: Options) -> Iterator[tuple[str, Options]]:
    """What could be opened beside `options`, in words, each alone and then all of it."""
    opened = dict(options.open)
    more: dict[str, Options] = {}
    for name in ("width", "conv", "keep"):
        if opened.get(name, (None,)):  # closed, or limited to some values
            more[f"{name} in --space"] = dataclasses.replace(options, open={**opened, name: ()})
    if not options.search_stages:
        more["--search-stages"] = dataclasses.replace(options, search_stages=True)
    yield from more.items()
    if len(more) > 1:
        everything = {**opened, "width": (), "conv": (), "keep": ()}
        yield "all of these", dataclasses.replace(options, open=everything, search_stages=True)


def reachable_by_opening(
    base: nn.Module, analysis: Analysis, options: Options, kinds: Sequence[str], measured: Measured
) -> str:
    """In words, the smallest costs of `kinds` that further choices would reach; empty where none would be smaller.

    `measured` measures, of kinds that are, that of the student of such an analysis that has the fewest MACs."""
    now = _smallest(base, analysis, kinds, measured)
    parts = []
    for words, further in further_options(options):
        try:
            multiple = further.channel_multiple
            wider = analyse(
                base, analysis.input_size, name=analysis.name, open=further.aspects, channel_multiple=multiple
            )
            smallest = _smallest(base, restrict(wider, further), kinds, measured)
        except ModelError:  # what cannot be opened reaches nothing
            continue
        if any(smallest[kind] < now[kind] for kind in kinds):
            parts.append(f"with {words} {', '.join(f'{kind}={amount(kind, smallest[kind])}' for kind in kinds)}")
    return "; ".join(parts)


def _smallest(base: nn.Module, analysis: Analysis, kinds: Sequence[str], measured: Measured) -> Mapping[str, int]:
    table = cost_table(analysis, base, kinds)
    cheapest = {kind: table.cheapest("macs" if kind in MEASURED else kind) for kind in kinds}
    return {
        kind: measured(kind, analysis, genotype) if kind in MEASURED else table.cost(genotype)[kind]
        for kind, genotype in cheapest.items()
    }
