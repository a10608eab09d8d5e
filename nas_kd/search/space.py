"""The search space of a base, for anyone's Optuna study: suggests genotypes, prices them, builds students."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np
import optuna
from numpy.typing import NDArray
from torch import nn

from nas_kd.analysis.structure import Analysis, Block
from nas_kd.budget import LATENCY, Budget, Cost, kinds_of, parse_budget
from nas_kd.costs.cost_model import CostModel, measured_in
from nas_kd.costs.cost_table import CostTable
from nas_kd.costs.latency_table import Meter
from nas_kd.costs.verification import analyse
from nas_kd.errors import BudgetError, GenotypeError
from nas_kd.genotype import Choice, Genotype
from nas_kd.library.library import Library
from nas_kd.networks.hub import input_size_of
from nas_kd.networks.plain import plain, tell_of_hooks, unwrapped
from nas_kd.networks.rebuilt import check_exportable
from nas_kd.search.feasibility import check_feasible
from nas_kd.search.options import Options, parse_options, restrict
from nas_kd.search.starts import measured_starts, mixed_starts, prior_damages
from nas_kd.search.workers import GENOTYPE
from nas_kd.students.inheritance import inherit_student

Network = TypeVar("Network", bound=nn.Module)
AnyTrial = optuna.trial.BaseTrial | optuna.trial.FrozenTrial
_MEASURED = "measured"  # the user attribute of a trial whose latency is that of its whole student
_DROPPED = 4.0  # docs/decisions.md
STARTS = 8  # genotypes at most that a search begins with
_FIELDS = {"width": "width", "kernel": "kernel_size", "conv": "conv", "keep": "keep"}  # parameter → field of a choice


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Space(Generic[Network]):
    """What a trained timm CNN may become, within a hard budget. A value: what is to be different is another space.

    Attributes:
        base: The network that is searched from.
        options: Which choices are open.
        costs: What students cost; it learns from what is measured.
        budget: The bounds, or None.
        levels: Shares of the budget that starts and proposals are spread over.
        library: With whose weights students start, and by whose damages `starts` are chosen; or None.
        given: Genotypes of yours that a study begins with before `starts`, those within the budget.

    Example:
        >>> import optuna, timm
        >>> from nas_kd import Space
        >>> space = Space(timm.create_model("test_resnet", num_classes=10), budget="params=50%", img_size=32)
        >>> def objective(trial):
        ...     student = space.suggest(trial)  # optuna.TrialPruned when over budget
        ...     return sum(p.numel() for p in student.parameters()) / space.base_cost().params  # train it instead
        >>> study = optuna.create_study(direction="maximize")
        >>> queued = space.enqueue(study)
        >>> study.optimize(objective, n_trials=4)
        >>> study.best_value <= 0.5
        True
    """

    base: Network
    options: Options
    costs: CostModel
    budget: Budget | None
    levels: tuple[float, ...]
    library: Library | None
    given: tuple[Genotype, ...]

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
        """Analyses `base`: a fraction of a second. The network is not changed.

        Args:
            base: A network of timm. What is wrapped around it (`torch.compile`, `DataParallel`) is left out; so are its
                hooks, with a warning, and synchronised batch norms become usual ones.
            budget: As in `with_budget`.
            img_size: The side of its images in pixels; by default the model's own.
            options: Which choices are open (`parse_options`).
            name: By which errors name the base.
            meter: Measures latencies now, for some minutes.

        Raises:
            ModelError: When the base cannot be analysed, or was changed by hand, so that its students could not be
                loaded.
            BudgetError: When no student fits the budget.
            GenotypeError: For options that leave nothing.
        """
        network = plain(base)
        tell_of_hooks(unwrapped(base))
        check_exportable(network)
        options = options or parse_options()
        analysis = analyse(
            network,
            input_size_of(network, img_size),
            name=name,
            open=options.aspects,
            channel_multiple=options.channel_multiple,
        )
        costs = CostModel(network, restrict(analysis, options))
        if meter is not None:
            costs = costs.with_latency(meter)
        self._become(base=network, options=options, costs=costs, budget=None, levels=(1.0,), library=None, given=())
        if budget is not None:
            bounded = self.with_budget(budget)
            self._become(costs=bounded.costs, budget=bounded.budget)

    def _become(self, **values: Any) -> None:
        vars(self).update(values)  # past the frozen dataclass

    def _with(self, **changes: Any) -> Space[Network]:
        other: Space[Network] = object.__new__(type(self))
        other._become(**{**vars(self), **changes})
        return other

    def with_budget(self, budget: str | Budget | None) -> Space[Network]:
        """A space whose students are within `budget`.

        What it bounds and nobody has measured is measured now: latency, for some minutes, by torch on one thread of
        this machine, cycles of the accelerator `nas_kd.budget.ACCELERATOR`.

        Args:
            budget: Text such as `params=1M,macs=30%` (`parse_budget`), a Budget, or None for no bounds.

        Returns:
            Another space, of the same base.

        Raises:
            BudgetError: When no student is within; it names the smallest that can be reached.
        """
        if budget is None:
            return self._with(budget=None)
        bounds = parse_budget(budget) if isinstance(budget, str) else budget
        costs = self.costs.telling(bounds)
        bounds = parse_budget(budget, costs.base_cost()) if isinstance(budget, str) else budget
        check_feasible(costs, self.options, bounds)
        return self._with(costs=costs, budget=bounds)

    def widened(self, times: float) -> Space[Network]:
        """A space whose budget is so many times as large, at least once."""
        assert self.budget is not None
        assert times >= 1  # so that it needs no check: what is within the budget is within this one
        return self._with(budget=self.budget.scaled(times))

    def with_levels(self, levels: Sequence[float]) -> Space[Network]:
        """A space whose starts and proposals are spread over these shares of the budget, the last of which is 1, so
        that one study finds the best student within each. Raises BudgetError when no student is within the smallest."""
        assert self.budget is not None
        if levels[0] < 1:
            check_feasible(self.costs, self.options, self.budget.scaled(levels[0]))
        return self._with(levels=tuple(levels))

    def with_library(self, library: Library | None) -> Space[Network]:
        """A space whose students start from the weights of a library (`build_library`)."""
        return self._with(library=library)

    def with_given(self, genotypes: Iterable[Genotype]) -> Space[Network]:
        """A space in which a study begins with these genotypes, before the `starts`."""
        return self._with(given=tuple(genotypes))

    def with_costs(self, costs: CostModel) -> Space[Network]:
        """A space whose costs are told by another model of the same base."""
        return self._with(costs=costs)

    @property
    def analysis(self) -> Analysis:
        """The base's blocks and how they hang together."""
        return self.costs.analysis

    @property
    def input_size(self) -> tuple[int, int, int]:
        """The images that the base takes: C, H, W."""
        channels, height, width = self.analysis.input_size
        return channels, height, width

    @property
    def table(self) -> CostTable:
        """The costs of all genotypes; of what is measured as it is expected by now."""
        return self.costs.table

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the base with the choices open to each."""
        return self.analysis.blocks

    def base_cost(self) -> Cost:
        """The cost of the base itself, its latency and cycles as they were measured."""
        return self.costs.base_cost()

    @functools.cached_property
    def distributions(self) -> dict[str, optuna.distributions.CategoricalDistribution]:
        """The flat, constant set of Optuna parameters: `BLOCK.width`, `BLOCK.kernel`, `BLOCK.conv`,
        `BLOCK.keep` where open."""
        return {
            f"{block.name}.{parameter}": optuna.distributions.CategoricalDistribution(values)
            for block in self.blocks
            for parameter, values in _open_values(block).items()
        }

    def suggest_genotype(self, trial: AnyTrial) -> Genotype:
        """The genotype of a trial, all parameters suggested; nothing is checked or built."""
        point = {name: trial.suggest_categorical(name, d.choices) for name, d in self.distributions.items()}
        return self.genotype(point)

    def suggest(self, trial: AnyTrial) -> Network:
        """The student that a trial proposes, with inherited weights; yours to train.

        Genotype, digest and costs are noted as user attributes of the trial, and a constraint per bound.

        Args:
            trial: Of a study whose parameters are this space's.

        Returns:
            A network of the base's class.

        Raises:
            optuna.TrialPruned: When it is over budget: before any network is built, or when the whole student turns out
                too slow.
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
        if LATENCY in self.costs.known(genotype):
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
        return self.costs.cost(genotype)

    def confirmed_cost(self, genotype: Genotype) -> Cost:
        """The cost of a genotype, its latency and cycles measured on the whole student where the budget bounds them
        and nothing else rules it out."""
        self.confirm([genotype])
        return self.cost(genotype)

    def confirm(self, genotypes: Iterable[Genotype]) -> None:
        """Measures whole students turn by turn, as `confirmed_cost` does one: together they take less."""
        for kind in measured_in(self.budget):
            assert self.budget is not None
            if within := [genotype for genotype in genotypes if self.budget.admits(self.cost(genotype))]:
                self.costs.measure(kind, *within)

    def student(self, source: Genotype | AnyTrial) -> Network:
        """The student of a genotype or of a trial, with weights inherited from the base, or from the library.

        Batch-norm statistics are still the base's: recalibrate them.

        Args:
            source: A genotype of this space, or a trial of its parameters.

        Returns:
            A network of the base's class.

        Raises:
            BudgetError: When it is over the budget: nothing over it is ever built.
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
        if self.budget is None or not measured_in(self.budget):
            return mixed_starts(self.table, self.budget, count, damages, self.levels)
        return measured_starts(self.costs, self.budget, count, damages, self.levels)

    def enqueue(self, study: optuna.Study, count: int = STARTS, *, dearest_first: bool = False) -> int:
        """Queues `starts` in a study, behind `given`; those that it has already are skipped.

        Args:
            study: To which they are added as waiting trials.
            count: How many starts at most.
            dearest_first: Whether the one that uses the budget the most goes before the others: a study of few trials
                has it, too.

        Returns:
            How many there are.
        """
        given = [g for g in self.given if self.budget is None or self.budget.admits(self.confirmed_cost(g))]
        starts = self.starts(count)
        if dearest_first:
            starts = [*starts[-1:], *starts[:-1]]
        starts = list(dict.fromkeys((*given, *starts)))
        for genotype in starts:
            study.enqueue_trial(self.point(genotype), user_attrs={"source": "warm start"}, skip_if_exists=True)
        self.recall_latencies(study)
        return len(starts)

    def recall_latencies(self, study: optuna.Study) -> None:
        """Takes over the latencies of whole students that were measured in trials of a study, by an earlier run or
        another worker, so that the table is corrected by them too."""
        trials = study.get_trials(deepcopy=False) if self.costs.latency is not None else ()
        noted = [trial for trial in trials if trial.user_attrs.get(_MEASURED) and LATENCY in trial.user_attrs]
        self.costs.recall({self.genotype(trial.params): int(trial.user_attrs[LATENCY]) for trial in noted})


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
