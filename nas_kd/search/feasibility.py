"""Whether a budget can be met at all, and if not by what it could be: the smallest costs, and further choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from nas_kd.analysis.structure import Analysis
from nas_kd.budget import MEASURED, Budget, amount
from nas_kd.costs.cost_model import CostModel, measured_in
from nas_kd.costs.cost_table import cost_table
from nas_kd.costs.verification import analyse
from nas_kd.errors import BudgetError, ModelError
from nas_kd.search.options import Options, restrict
from nas_kd.search.solver import solve
from nas_kd.search.starts import feasible_starts


def check_feasible(costs: CostModel, options: Options, budget: Budget) -> None:
    """Raises BudgetError when no genotype is within `budget`, and names the smallest reachable costs, and those that
    choices would reach which `options` leave closed."""
    smallest = {kind: costs.smallest(kind) for kind in budget}
    impossible = [kind for kind in budget if smallest[kind] > budget[kind]]
    if not impossible and _admits_any(costs, budget):
        return
    reachable = ", ".join(f"{kind}={amount(kind, cost)}" for kind, cost in smallest.items())
    together = "" if impossible else " (each alone; no student meets all bounds together)"
    more = _reachable_by_opening(costs, options, impossible or list(budget))
    raise BudgetError(
        f"no student of {costs.analysis.name} is within {budget}: the smallest reachable is {reachable}"
        f"{together}; raise the budget{' or open more choices: ' if more else ''}{more}"
    )


def _admits_any(costs: CostModel, budget: Budget) -> bool:
    if measured := measured_in(budget):
        return all(_admits_fastest(costs, budget, kind) for kind in measured)
    if feasible_starts(costs.table, budget, 1):
        return True
    try:
        return solve(costs.table, budget) is not None
    except TimeoutError:  # neither found nor ruled out: the search may find one
        return True


def _admits_fastest(costs: CostModel, budget: Budget, kind: str) -> bool:
    """Whether the student that is expected to be the fastest (in a kind that is measured) within all other bounds is
    within that one."""
    expected = [totals.astype(np.float64) for totals in costs.table.beside_narrowest(kind)]
    try:
        fastest = solve(costs.table, budget.without(kind), expected)
    except TimeoutError:
        return True
    return fastest is not None and costs.measure(kind, fastest)[0] <= budget[kind]


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


def _reachable_by_opening(costs: CostModel, options: Options, kinds: Sequence[str]) -> str:
    """In words, the smallest costs of `kinds` that further choices would reach; empty where none would be smaller."""
    analysis, now = costs.analysis, _smallest(costs, costs.analysis, kinds)
    parts = []
    for words, further in further_options(options):
        try:
            multiple = further.channel_multiple
            wider = analyse(
                costs.base, analysis.input_size, name=analysis.name, open=further.aspects, channel_multiple=multiple
            )
            smallest = _smallest(costs, restrict(wider, further), kinds)
        except ModelError:  # what cannot be opened reaches nothing
            continue
        if any(smallest[kind] < now[kind] for kind in kinds):
            parts.append(f"with {words} {', '.join(f'{kind}={amount(kind, smallest[kind])}' for kind in kinds)}")
    return "; ".join(parts)


def _smallest(costs: CostModel, analysis: Analysis, kinds: Sequence[str]) -> Mapping[str, int]:
    """The smallest costs of the base's students in this analysis; of what is measured that of the fewest MACs."""
    table = cost_table(analysis, costs.base, kinds)
    cheapest = {kind: table.cheapest("macs" if kind in MEASURED else kind) for kind in kinds}
    return {
        kind: costs.measure_opened(kind, analysis, genotype) if kind in MEASURED else table.cost(genotype)[kind]
        for kind, genotype in cheapest.items()
    }
