"""The search space of a base, for anyone's Optuna study: suggests genotypes, prices them, builds students."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import optuna
from numpy.typing import NDArray
from torch import nn

from nas_kd.analysis.structure import Block
from nas_kd.budget import ACCELERATOR, CYCLES, DEVICE, LATENCY, MEASURED, Budget, Cost, amount, kinds_of, parse_budget
from nas_kd.costs.cost_table import cost_table
from nas_kd.costs.cost_terms import Counts
from nas_kd.costs.cycle_table import CycleTable
from nas_kd.costs.device import device_table
from nas_kd.costs.latency_table import LatencyTable, Meter
from nas_kd.costs.runtimes import LatencySpec
from nas_kd.costs.verification import analyse
from nas_kd.errors import BudgetError, GenotypeError
from nas_kd.genotype import Choice, Genotype
from nas_kd.library.library import Library
from nas_kd.networks.hub import input_channels
from nas_kd.networks.micro import Estimator
from nas_kd.networks.plain import plain, tell_of_hooks, unwrapped
from nas_kd.networks.rebuilt import check_exportable
from nas_kd.search.further import reachable_by_opening
from nas_kd.search.measured import MEASURING, MeasuredCosts
from nas_kd.search.options import Options, parse_options, restrict
from nas_kd.search.solver import solve
from nas_kd.search.starts import feasible_starts, mixed_starts, prior_damages, tightness
from nas_kd.search.workers import GENOTYPE
from nas_kd.students.inheritance import inherit_student

Network = TypeVar("Network", bound=nn.Module)
AnyTrial = optuna.trial.BaseTrial | optuna.trial.FrozenTrial
_MEASURED = "measured"  # the user attribute of a trial whose latency is that of its whole student
_REARRANGED = 16  # channels: a first convolution that reads as many does not read an image as it is
_DROPPED = 4.0  # docs/decisions.md
STARTS = 8  # genotypes at most that a search begins with
_ROUNDS = 4  # in which starts are measured and chosen anew
_TIGHTER = 0.01  # of a bound on what is measured: what each round of them leaves free, for what the table does not know
_OVER = 2.0  # the level of what is over the budget
_FIELDS = {"width": "width", "kernel": "kernel_size", "conv": "conv", "keep": "keep"}  # parameter → field of a choice


class Space(MeasuredCosts, Generic[Network]):
    """What a trained timm CNN may become, within a hard budget.

    Attributes: `base`, the network searched from; `budget`, or None; `blocks` with the choices open to each; `library`,
    None until there is one (`build_library`): students then start from its weights, and `starts` from its damages;
    `latency` and `cycles`, None until they are measured (`measure_latency`, `estimate_cycles`); `levels`, the shares of
    the budget that starts and proposals are spread over; `given`, genotypes of yours that a study begins with before
    `starts`, those within the budget.

    Example::

        space = Space(teacher, budget="params=1M", img_size=160)
        def objective(trial):
            student = space.suggest(trial)  # TrialPruned when over budget
            return train(student)
    """

    def __init__(
        self,
        base: Network,
        *,
        budget: str | Budget | None = None,
        img_size: int | None = None,
        options: Options | None = None,
        name: str = "",
        meter: Meter | None = None,
    ) -> None:
        """Analyses `base` (a fraction of a second; the network is not changed).

        `budget` is text such as `params=1M,macs=30%` or a Budget; `img_size` the side of its images in pixels, by
        default the model's own; `options` limits the choices (`parse_options`). With `meter`, or a budget that bounds
        the latency, that is measured now, for some minutes: without a `meter` by torch on one thread of this machine.
        Cycles that are bounded are estimated now, of the accelerator `ACCELERATOR`, if nothing was before.
        Raises ModelError when the base cannot be analysed, BudgetError when no student fits the budget, GenotypeError
        for options that leave nothing. What is wrapped around the base (`torch.compile`, `DataParallel`) is left out;
        so are its hooks, with a warning, and synchronised batch norms become usual ones. A base of timm that was
        changed by hand, so that exports of its students could not be loaded, is refused (ModelError).
        """
        self.base: Network = plain(base)
        tell_of_hooks(unwrapped(base))
        check_exportable(self.base)
        self.input_size = input_size_of(self.base, img_size)
        self.options = options or parse_options()
        analysis = analyse(
            self.base,
            self.input_size,
            name=name,
            open=self.options.aspects,
            channel_multiple=self.options.channel_multiple,
        )
        self.analysis = restrict(analysis, self.options)
        self.table = cost_table(self.analysis, self.base)
        self.budget: Budget | None = None
        self.levels: tuple[float, ...] = (1.0,)
        self.library: Library | None = None
        self.latency: LatencyTable | None = None
        self.cycles: CycleTable | None = None
        self.given: tuple[Genotype, ...] = ()
        if meter is not None:
            self.measure_latency(meter)
        if budget is not None:
            self.set_budget(budget)

    def set_budget(self, budget: str | Budget) -> None:
        """Bounds the students. Raises BudgetError when none is within, and then the budget stays what it was."""
        bounds = parse_budget(budget) if isinstance(budget, str) else budget
        if set(DEVICE) & set(bounds):
            self.count_device()
        if LATENCY in bounds and self.latency is None:
            self.measure_latency(Meter(LatencySpec()))
        if CYCLES in bounds and self.cycles is None:
            self.estimate_cycles(Estimator(ACCELERATOR))
        bounds = parse_budget(budget, self.base_cost()) if isinstance(budget, str) else budget
        self.check_budget(bounds)
        self.budget = bounds

    def set_levels(self, levels: Sequence[float]) -> None:
        """Spreads starts and proposals over these shares of the budget, the last of which is 1, so that one study finds
        the best student within each. Raises BudgetError when no student is within the smallest."""
        assert self.budget is not None
        if levels[0] < 1:
            self.check_budget(self.budget.scaled(levels[0]))
        self.levels = tuple(levels)

    def count_device(self) -> None:
        """Counts what the int8 form takes on a device: costs hold flash and ram from then on. Raises ModelError for a
        base with operators that interpreters on devices do not get."""
        if self.table.device is None:
            self.table = self.table.with_device(device_table(self.analysis, Counts(self.analysis)))

    def _measured_in(self, budget: Budget | None) -> list[str]:
        """The kinds of cost that a budget bounds and that are measured on whole students."""
        return [kind for kind in MEASURED if kind in (budget or ())]

    def recall_latencies(self, study: optuna.Study) -> None:
        """Takes over the latencies of whole students that were measured in trials of a study, by an earlier run or
        another worker, so that the table is corrected by them too."""
        if self.latency is None:
            return
        with MEASURING:
            for trial in study.get_trials(deepcopy=False):
                if trial.user_attrs.get(_MEASURED) and LATENCY in trial.user_attrs:
                    genotype = self.genotype(trial.params)
                    if self.latency.known(genotype) is None:
                        self.latency.observe(genotype, int(trial.user_attrs[LATENCY]))
            self.table = self.latency.onto(self.table)

    def base_cost(self) -> Cost:
        """The cost of the base itself, its latency and cycles as they were measured."""
        return self.cost(self.analysis.identity)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the base with the choices open to each."""
        return self.analysis.blocks

    @functools.cached_property
    def distributions(self) -> dict[str, optuna.distributions.CategoricalDistribution]:
        """The flat, constant set of Optuna parameters: `BLOCK.width`, `BLOCK.kernel`, `BLOCK.conv`,
        `BLOCK.keep` where open."""
        return {
            f"{block.name}.{parameter}": optuna.distributions.CategoricalDistribution(values)
            for block in self.blocks
            for parameter, values in _open_values(block).items()
        }

    def check_budget(self, budget: Budget) -> None:
        """Raises BudgetError when no genotype is within `budget`, and names the smallest reachable costs."""
        smallest = {kind: self._smallest(kind) for kind in budget}
        impossible = [kind for kind in budget if smallest[kind] > budget[kind]]
        if impossible or not self._admits_any(budget):
            reachable = ", ".join(f"{kind}={amount(kind, cost)}" for kind, cost in smallest.items())
            together = "" if impossible else " (each alone; no student meets all bounds together)"
            more = reachable_by_opening(
                self.base, self.analysis, self.options, impossible or list(budget), self._elsewhere
            )
            raise BudgetError(
                f"no student of {self.analysis.name} is within {budget}: the smallest reachable is {reachable}"
                f"{together}; raise the budget{' or open more choices: ' if more else ''}{more}"
            )

    def _admits_any(self, budget: Budget) -> bool:
        if measured := self._measured_in(budget):
            return all(self._admits_fastest(budget, kind) for kind in measured)
        if feasible_starts(self.table, budget, 1):
            return True
        try:
            return solve(self.table, budget) is not None
        except TimeoutError:  # neither found nor ruled out: the search may find one
            return True

    def _admits_fastest(self, budget: Budget, kind: str) -> bool:
        """Whether the student that is expected to be the fastest (in a kind that is measured) within all other bounds
        is within that one."""
        expected = [totals.astype(np.float64) for totals in self.table.beside_narrowest(kind)]
        try:
            fastest = solve(self.table, budget.without(kind), expected)
        except TimeoutError:
            return True
        return fastest is not None and self._measure(kind, fastest)[0] <= budget[kind]

    def suggest_genotype(self, trial: AnyTrial) -> Genotype:
        """The genotype of a trial, all parameters suggested; nothing is checked or built."""
        point = {name: trial.suggest_categorical(name, d.choices) for name, d in self.distributions.items()}
        return self.genotype(point)

    def suggest(self, trial: AnyTrial) -> Network:
        """The student that a trial proposes, with inherited weights; yours to train.

        Notes genotype, digest and costs as user attributes and a constraint per bound. Raises optuna.TrialPruned when
        it is over budget: before any network is built, or when the whole student turns out too slow.
        """
        genotype = self.suggest_genotype(trial)
        self.admit(trial, genotype)
        return self.student(genotype)

    def admit(self, trial: AnyTrial, genotype: Genotype) -> Cost:
        """Notes a genotype and its cost on its trial and returns the cost. Raises optuna.TrialPruned when over budget.

        The digest, by which other workers know a trial, comes last: whoever finds it finds all of this.
        """
        cost = self.confirmed_cost(genotype)
        trial.set_user_attr(GENOTYPE, genotype.to_json())
        for kind in kinds_of(self.budget):
            trial.set_user_attr(kind, cost[kind])
        if self.latency is not None and self.latency.known(genotype) is not None:
            trial.set_user_attr(_MEASURED, True)
        for kind, excess in (self.budget.excess(cost) if self.budget is not None else {}).items():
            trial.set_constraint(kind, excess)
        trial.set_user_attr("digest", genotype.digest)
        if self.budget is not None and not self.budget.admits(cost):
            trial.set_user_attr("reason", self.budget.explain(cost))
            raise optuna.TrialPruned(self.budget.explain(cost))
        return cost

    def genotype(self, point: Mapping[str, Any]) -> Genotype:
        """The genotype of a trial's parameters. Raises GenotypeError for parameters of another space."""
        unknown = set(point) - set(self.distributions)
        if unknown:
            raise GenotypeError(
                f"{self.analysis.name} has no parameter {sorted(unknown)[0]!r}: is it of another space?"
            )
        genotype = Genotype.of({block.name: _choice(block, point) for block in self.blocks})
        self.analysis.check(genotype)
        return genotype

    def point(self, genotype: Mapping[str, Choice]) -> dict[str, Any]:
        """The trial's parameters of a genotype; the inverse of `genotype`. Those of a dropped block that mean nothing
        are as in the base."""
        return {
            f"{block.name}.{parameter}": _shown(block, genotype[block.name], parameter)
            for block in self.blocks
            for parameter in _open_values(block)
        }

    def cost(self, genotype: Mapping[str, Choice]) -> Cost:
        """The exact cost of a genotype, in closed form: equal to what the built student counts. Its latency and cycles,
        if any were measured, are its own or, until those are measured, the table's."""
        self.analysis.check(genotype)
        return dataclasses.replace(self.table.cost(genotype), **self.known(genotype))

    def confirmed_cost(self, genotype: Genotype) -> Cost:
        """The cost of a genotype, its latency and cycles measured on the whole student where the budget bounds them
        and nothing else rules it out."""
        self.confirm([genotype])
        return self.cost(genotype)

    def confirm(self, genotypes: Iterable[Genotype]) -> None:
        """Measures whole students turn by turn, as `confirmed_cost` does one: together they take less."""
        for kind in self._measured_in(self.budget):
            assert self.budget is not None
            if within := [genotype for genotype in genotypes if self.budget.admits(self.cost(genotype))]:
                self._measure(kind, *within)

    def student(self, source: Genotype | AnyTrial) -> Network:
        """The student of a genotype or of a trial, with weights inherited from the base, or from the library.

        Batch-norm statistics are still the base's: recalibrate them. Raises BudgetError when it is over the budget:
        nothing over it is ever built.
        """
        genotype = source if isinstance(source, Genotype) else self.genotype(source.params)
        if self.budget is not None and not self.budget.admits(cost := self.confirmed_cost(genotype)):
            raise BudgetError(self.budget.explain(cost))
        if self.library is not None:
            return cast(Network, self.library.student(genotype))
        return inherit_student(self.base, self.analysis, genotype)

    def damages(self) -> list[NDArray[np.float64]]:
        """Per block over its choices, how much each hurts: as the library measured it, else a prior. What a dropped
        block does alone counts more than once: dropped together, blocks hurt more than the sum."""
        if self.library is None:
            return prior_damages(self.table)
        weights = (np.array([1.0 if c.keep else _DROPPED for c in block.choices]) for block in self.blocks)
        return [own * weight for own, weight in zip(self.library.damages(), weights, strict=True)]

    def starts(self, count: int = STARTS) -> list[Genotype]:
        """Up to `count` genotypes within the budget, from cheap to dear, to begin a search with."""
        damages = None if self.library is None else self.damages()
        measured = self._measured_in(self.budget)
        if self.budget is None or not measured:
            return mixed_starts(self.table, self.budget, count, damages, self.levels)
        asked = [kind for kind in measured if kind not in self.budget.fixed]
        found: list[Genotype] = []
        tight = self.budget
        # each round's measurements correct the table for the next, which solves anew what comes near the bounds; few
        # come near one that is the base's own
        for number in range(_ROUNDS if asked else 1):
            starts = mixed_starts(self.table, tight, 1 if number else count, damages, self.levels)
            expected = [self._level(self.table.cost(genotype), tight) for genotype in starts]
            for kind in measured:
                self._measure(kind, *starts, layers=True)
            costs = [self.cost(genotype) for genotype in starts]
            reached = [self._level(cost, self.budget) for cost in costs]
            within = [genotype for genotype, level in zip(starts, reached, strict=True) if level < _OVER]
            found = list(dict.fromkeys([*within, *found]))
            if all(now <= then for now, then in zip(reached, expected, strict=True)):
                break
            for kind in asked:
                # solutions are what the table takes for cheaper than it is: their bound goes down by what they are over
                over = max(1.0, max(cost[kind] for cost in costs) / self.budget[kind])
                tight = tight.with_bound(kind, round(tight[kind] / over * (1 - _TIGHTER)))
        return sorted(found[:count], key=lambda genotype: tightness(self.cost(genotype), self.budget, self.base_cost()))

    def _level(self, cost: Cost, budget: Budget) -> float:
        """The smallest of the levels at which a cost is within a budget; more than any where it is not at all."""
        return min((level for level in self.levels if budget.scaled(level).admits(cost)), default=_OVER)

    def enqueue(self, study: optuna.Study, count: int = STARTS, *, dearest_first: bool = False) -> int:
        """Queues `starts` in a study and returns how many; those that it has already are skipped. With `dearest_first`
        the one that uses the budget the most goes before the others: a study of few trials has it, too."""
        given = [g for g in self.given if self.budget is None or self.budget.admits(self.confirmed_cost(g))]
        starts = self.starts(count)
        if dearest_first:
            starts = [*starts[-1:], *starts[:-1]]
        starts = list(dict.fromkeys((*given, *starts)))
        for genotype in starts:
            study.enqueue_trial(self.point(genotype), user_attrs={"source": "warm start"}, skip_if_exists=True)
        self.recall_latencies(study)
        return len(starts)


def input_size_of(network: nn.Module, img_size: int | None) -> tuple[int, int, int]:
    """The images (C, H, W) that a network takes: its first convolution's channels, the given or its own size.

    Some networks rearrange an image before they convolve it (TResNet: 3 channels to 48): then it is what timm was asked
    for that counts.
    """
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    asked = input_channels(network)
    if first is not None and (asked is None or first.in_channels < _REARRANGED):
        channels = first.in_channels
    elif asked is not None:
        channels = asked
    return (channels, img_size or height, img_size or width)


def _open_values(block: Block) -> dict[str, Sequence[Any]]:
    """The parameters of a block that have more than one value; a dropped block has none but `keep`."""
    kept = [choice for choice in block.choices if choice.keep]
    values = {
        parameter: tuple(
            dict.fromkeys(getattr(choice, name) for choice in (block.choices if parameter == "keep" else kept))
        )
        for parameter, name in _FIELDS.items()
    }
    return {parameter: options for parameter, options in values.items() if len(options) > 1}


def _choice(block: Block, point: Mapping[str, Any]) -> Choice:
    def value(parameter: str) -> Any:
        return point.get(f"{block.name}.{parameter}", getattr(block.default, _FIELDS[parameter]))

    if not value("keep"):
        return next(choice for choice in block.choices if not choice.keep)
    return Choice(width=value("width"), kernel_size=value("kernel"), conv=value("conv"))


def _shown(block: Block, choice: Choice, parameter: str) -> Any:
    source = choice if choice.keep or parameter == "keep" else block.default
    return getattr(source, _FIELDS[parameter])
