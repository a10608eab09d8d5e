"""Genotypes to begin a search with: a random one is seldom within the budget (ResNet-18 in 1 M: once in 300)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from nas_kd.analysis.blocks import WIDTHS
from nas_kd.analysis.structure import Block
from nas_kd.budget import KINDS, Budget, Cost, kinds_of
from nas_kd.costs.cost_model import CostModel, measured_in
from nas_kd.costs.cost_table import CostTable
from nas_kd.genotype import CONV_KINDS, Choice, Genotype, group_count
from nas_kd.search.additive import total
from nas_kd.search.goals import Box, Goals, most_useful
from nas_kd.search.solver import solve

Damages = Sequence[NDArray[np.float64]]  # per block over its choices
_PLANNED = 5_000  # genotypes whose arenas are planned at most
_GAP, _WIDE_GAP = 0.01, 0.05  # by which damages, which are estimates, may be larger than the least; of a mere candidate
_PER_START = 2  # knapsacks that are solved for each that is chosen
_BOUNDS = 512  # random bounds that stand for the budget
_ROUNDS = 4  # in which starts are measured and chosen anew
_TIGHTER = 0.01  # of a bound on what is measured: what each round of them leaves free, for what the table does not know
_OVER = 2.0  # the level of what is over the budget
_BELOW = 0.1  # of the range of scores, how far below the worst gains begin: the cheapest counts as well


def uniform_genotype(blocks: Iterable[Block], width: float, conv: str) -> Genotype:
    """Every block at the same width and kind; where a block does not offer it, the nearest below or its default."""
    return Genotype.of({block.name: _uniform_choice(block, width, conv) for block in blocks})


def _uniform_choice(block: Block, width: float, conv: str) -> Choice:
    kept = [choice for choice in block.choices if choice.keep] or block.choices
    widths = {choice.width for choice in kept}
    chosen = max((offered for offered in widths if offered <= width), default=min(widths))
    fitting = [choice for choice in kept if choice.width == chosen]
    own = [choice for choice in fitting if choice.kernel_size == block.default.kernel_size] or fitting
    return next((choice for choice in own if choice.conv == conv), own[0])


def _dropped(blocks: Iterable[Block], genotype: Genotype) -> Genotype:
    """The genotype without the blocks that may be dropped."""
    return Genotype.of({b.name: next((c for c in b.choices if not c.keep), genotype[b.name]) for b in blocks})


def uniform_ladder(table: CostTable, kinds_of_cost: Iterable[str] = KINDS) -> dict[Genotype, Cost]:
    """Uniform genotypes of every width and kind, with and without the blocks that may be dropped, and the cheapest of
    each kind of cost, with their costs."""
    kinds = dict.fromkeys((*CONV_KINDS, *(conv for block in table.blocks for conv in block.convs)))
    rungs = [uniform_genotype(table.blocks, *pair) for pair in itertools.product(WIDTHS, kinds)]
    rungs += [_dropped(table.blocks, genotype) for genotype in rungs]
    rungs += [table.cheapest(kind) for kind in kinds_of_cost]
    return {genotype: table.cost(genotype) for genotype in dict.fromkeys(rungs)}


def tightness(cost: Cost, budget: Budget | None, base: Cost) -> float:
    """The largest share of a bound that a cost uses (of the base, without a budget); ≤ 1 is within."""
    limits = {kind: base[kind] for kind in KINDS} if budget is None else dict(budget)
    return max(cost[kind] / limit for kind, limit in limits.items())


def feasible_starts(table: CostTable, budget: Budget | None, count: int) -> list[Genotype]:
    """Up to `count` uniform genotypes within the budget, evenly from the cheapest to the dearest."""
    ladder = {g: tightness(cost, budget, table.base()) for g, cost in uniform_ladder(table, kinds_of(budget)).items()}
    within = sorted((g for g, share in ladder.items() if share <= 1), key=lambda g: ladder[g])
    if len(within) <= count:
        return within
    return [within[index] for index in np.linspace(0, len(within) - 1, count).round().astype(int)]


# What a block loses at a width and by a kind (KL of the logits when it alone is swapped in, after block-wise training):
# means over the blocks of a ResNet-20 on CIFAR-10. A prior until the base's own blocks are measured.
_WIDTH_DAMAGE = {1.0: 0.0, 0.75: 0.004, 0.5: 0.015, 0.375: 0.03, 0.25: 0.055, 0.125: 0.2}
_CONV_DAMAGE = {"standard": 0.0, "group": 0.016, "blueprint": 0.065, "depthwise": 0.065, "shift": 0.239}


def prior_damages(table: CostTable) -> list[NDArray[np.float64]]:
    """For each block, how much each of its choices is expected to hurt: 0 for what the base has."""
    return [np.array([_prior_damage(choice, block.default) for choice in block.choices]) for block in table.blocks]


def _prior_damage(choice: Choice, default: Choice) -> float:
    damage = _WIDTH_DAMAGE.get(choice.width, 1.0 - choice.width)
    if choice.conv not in (None, default.conv):
        damage += _CONV_DAMAGE["group" if group_count(choice.conv) else choice.conv]
    return damage + (0.0 if choice.keep else 0.3)


def knapsack_starts(
    table: CostTable, budget: Budget, damages: Damages, count: int, levels: Sequence[float] = (1.0,)
) -> list[Genotype]:
    """The genotypes of least total damage within the budget and within each smaller one of `levels`; then, up to
    `count`, of those within bounds that are lowered each by itself the ones that add the most to the front."""
    at_levels = _solutions(table, [budget.scaled(level) for level in reversed(levels)], damages, _GAP)
    if not at_levels or count <= len(at_levels):
        return at_levels
    kinds, corner = kinds_of(budget), table.cost(at_levels[0])
    box = Box(
        kinds=kinds,
        least=np.array([float(table.cost(table.cheapest(kind))[kind]) for kind in kinds]),
        # what has no bound shall not cost more than with the whole budget
        most=np.array([budget.get(kind, float(corner[kind])) for kind in kinds]),
        levels=tuple(levels),
        fixed=budget.fixed,
    )
    apart = [Budget(tuple(zip(kinds, bounds, strict=True))) for bounds in box.bounds(_PER_START * count).tolist()]
    pool = dict.fromkeys((*at_levels, *_solutions(table, apart, damages, _WIDE_GAP)))
    return _most_useful(table, list(pool), damages, box, len(at_levels))[:count]


def _solutions(table: CostTable, levels: Iterable[Budget], damages: Damages, gap: float) -> list[Genotype]:
    """What the knapsack finds within each, without repetition; several at a time, as the solver lets go of Python."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda level: solve_in_time(table, level, damages, gap), levels))
    return list(dict.fromkeys(genotype for genotype in found if genotype is not None))


def _most_useful(table: CostTable, pool: Sequence[Genotype], damages: Damages, box: Box, first: int) -> list[Genotype]:
    """The `first` of the pool, and the others in the order of what each adds to the front of those before it."""
    rows = np.stack([table.indices(genotype) for genotype in pool])
    scores = -total(damages, rows)
    costs = table.priced(rows, box.kinds)
    goals = Goals(bounds=box.bounds(_BOUNDS), best=np.full(_BOUNDS, scores.min() - _BELOW * np.ptp(scores)))
    return [pool[index] for index, _ in most_useful(goals, scores, costs, range(first))]


def solve_in_time(table: CostTable, level: Budget, damages: Damages, gap: float = _GAP) -> Genotype | None:
    """What `solve` finds, or None where there is nothing or its time ran out first."""
    try:
        return solve(table, level, damages, gap=gap)
    except TimeoutError:
        return None


def mixed_starts(
    table: CostTable,
    budget: Budget | None,
    count: int,
    damages: Damages | None = None,
    levels: Sequence[float] = (1.0,),
) -> list[Genotype]:
    """Up to `count` genotypes within the budget from cheap to dear: from the knapsack on measured damages and an eighth
    of them uniform; half of each when there is but the prior."""
    if budget is None:
        return feasible_starts(table, None, count)
    if damages is None:
        solved = knapsack_starts(table, budget, prior_damages(table), (count + 1) // 2, levels)
    else:
        solved = knapsack_starts(table, budget, damages, count - count // 8, levels)
    uniform = [genotype for genotype in feasible_starts(table, budget, count) if genotype not in solved]
    spread = np.linspace(0, len(uniform) - 1, min(max(0, count - len(solved)), len(uniform))).round().astype(int)
    chosen = [*solved, *(uniform[index] for index in dict.fromkeys(spread.tolist()))]
    return sorted(chosen, key=lambda genotype: tightness(table.cost(genotype), budget, table.base()))


def measured_starts(
    costs: CostModel, budget: Budget, count: int, damages: Damages | None, levels: Sequence[float]
) -> list[Genotype]:
    """`mixed_starts` within a budget that bounds what is measured: whole students are, and those over it replaced."""
    measured = measured_in(budget)
    asked = [kind for kind in measured if kind not in budget.fixed]
    found: list[Genotype] = []
    tight = budget
    # each round's measurements correct the table for the next, which solves anew what comes near the bounds; few come
    # near one that is the base's own
    for number in range(_ROUNDS if asked else 1):
        starts = mixed_starts(costs.table, tight, 1 if number else count, damages, levels)
        expected = [_level(costs.table.cost(genotype), tight, levels) for genotype in starts]
        for kind in measured:
            costs.measure(kind, *starts, layers=True)
        own = [costs.cost(genotype) for genotype in starts]
        reached = [_level(cost, budget, levels) for cost in own]
        within = [genotype for genotype, level in zip(starts, reached, strict=True) if level < _OVER]
        found = list(dict.fromkeys([*within, *found]))
        if all(now <= then for now, then in zip(reached, expected, strict=True)):
            break
        for kind in asked:
            # solutions are what the table takes for cheaper than it is: their bound goes down by what they are over
            over = max(1.0, max(cost[kind] for cost in own) / budget[kind])
            tight = tight.with_bound(kind, round(tight[kind] / over * (1 - _TIGHTER)))
    base = costs.cost(costs.analysis.identity)
    return sorted(found[:count], key=lambda genotype: tightness(costs.cost(genotype), budget, base))


def _level(cost: Cost, budget: Budget, levels: Sequence[float]) -> float:
    """The smallest of the levels at which a cost is within a budget; more than any where it is not at all."""
    return min((level for level in levels if budget.scaled(level).admits(cost)), default=_OVER)


def uniform_width_students(table: CostTable, budget: Budget) -> Iterator[Genotype]:
    """The genotypes within the budget that have one width and the base's own convolutions everywhere, widest first."""
    for width in WIDTHS:
        genotype = Genotype.of(
            {block.name: _uniform_choice(block, width, block.default.conv or "standard") for block in table.blocks}
        )
        if budget.admits(table.cost(genotype)):
            yield genotype


def uniform_width_student(table: CostTable, budget: Budget) -> Genotype | None:
    """The first of `uniform_width_students`, None where there is none."""
    return next(uniform_width_students(table, budget), None)


def draw_genotypes(
    table: CostTable, budget: Budget, seed: int, draws: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Random genotypes, `draws` × blocks positions of choices, and whether each is within the budget. Fewer are drawn
    where arenas are to be planned, which takes a hundred times as long."""
    draws = min(draws, _PLANNED) if "ram" in budget else draws
    generator = np.random.default_rng(seed)
    rows = np.stack([generator.integers(len(block.choices), size=draws) for block in table.blocks], axis=1)
    costs = table.many(rows, budget)
    return rows, np.all([costs[kind] <= bound for kind, bound in budget.items()], axis=0)


def random_genotype(table: CostTable, budget: Budget, seed: int, draws: int = 200_000) -> Genotype | None:
    """A genotype drawn evenly from the part of the space within the budget; None when no draw was within it."""
    rows, within = draw_genotypes(table, budget, seed, draws)
    return table.genotype(rows[np.flatnonzero(within)[0]]) if within.any() else None
