"""The search space of a base, for anyone's Optuna study: suggests genotypes, prices them, builds students."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import optuna
from numpy.typing import NDArray
from torch import nn

from nas_kd.budget import Budget, Cost, kinds_of, parse_budget, short
from nas_kd.errors import BudgetError, GenotypeError
from nas_kd.genotype import Choice, Genotype
from nas_kd.models.blocks import Block, analyse
from nas_kd.models.costs import cost_table
from nas_kd.models.inherit import inherit_student
from nas_kd.search.options import Options, parse_options, restrict
from nas_kd.search.solver import solve
from nas_kd.search.starts import feasible_starts, mixed_starts, prior_damages
from nas_kd.training.library import Library

Network = TypeVar("Network", bound=nn.Module)
AnyTrial = optuna.trial.BaseTrial | optuna.trial.FrozenTrial
_FIELDS = {"width": "width", "kernel": "kernel_size", "conv": "conv", "keep": "keep"}  # parameter → field of a choice


class Space(Generic[Network]):
    """What a trained timm CNN may become, within a hard budget.

    Attributes: `base`, the network searched from; `budget`, or None; `blocks` with the choices open to each; `library`,
    None until there is one (`build_library`): students then start from its weights, and `starts` from its damages.

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
    ) -> None:
        """Analyses `base` (a fraction of a second; the network is not changed).

        `budget` is text such as `params=1M,macs=30%` or a Budget; `img_size` the side of its images in pixels, by
        default the model's own; `options` limits the choices (`parse_options`). Raises ModelError when the base cannot
        be analysed, BudgetError when no student fits the budget, GenotypeError for options that leave nothing.
        """
        self.base = base
        self.input_size = input_size_of(base, img_size)
        options = options or parse_options()
        self.analysis = restrict(analyse(base, self.input_size, name=name, open=options.aspects), options)
        self.table = cost_table(self.analysis, base)
        self.budget = parse_budget(budget, self.table.base()) if isinstance(budget, str) else budget
        self.library: Library | None = None
        if self.budget is not None:
            self.check_budget(self.budget)

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
        smallest = {kind: self.table.cost(self.table.cheapest(kind))[kind] for kind in budget}
        impossible = [kind for kind in budget if smallest[kind] > budget[kind]]
        if impossible or not self._admits_any(budget):
            reachable = ", ".join(f"{kind}={short(cost)}" for kind, cost in smallest.items())
            together = "" if impossible else " (each alone; no student meets all bounds together)"
            raise BudgetError(
                f"no student of {self.analysis.name} is within {budget}: the smallest reachable is {reachable}"
                f"{together}; raise the budget or open more choices (--space)"
            )

    def _admits_any(self, budget: Budget) -> bool:
        if feasible_starts(self.table, budget, 1):
            return True
        try:
            return solve(self.table, budget) is not None
        except TimeoutError:  # neither found nor ruled out: the search may find one
            return True

    def suggest_genotype(self, trial: AnyTrial) -> Genotype:
        """The genotype of a trial, all parameters suggested; nothing is checked or built."""
        point = {name: trial.suggest_categorical(name, d.choices) for name, d in self.distributions.items()}
        return self.genotype(point)

    def suggest(self, trial: AnyTrial) -> Network:
        """The student that a trial proposes, with inherited weights; yours to train.

        Notes genotype, digest and costs as user attributes and a constraint per bound. Raises optuna.TrialPruned,
        before any network is built, when it is over budget.
        """
        genotype = self.suggest_genotype(trial)
        self.admit(trial, genotype)
        return self.student(genotype)

    def admit(self, trial: AnyTrial, genotype: Genotype) -> Cost:
        """Notes what a genotype costs on its trial and returns it. Raises optuna.TrialPruned when over budget."""
        cost = self.cost(genotype)
        trial.set_user_attr("digest", genotype.digest)
        for kind in kinds_of(self.budget):
            trial.set_user_attr(kind, cost[kind])
        if self.budget is not None:
            for kind, excess in self.budget.excess(cost).items():
                trial.set_constraint(kind, excess)
            if not self.budget.admits(cost):
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
        """The exact cost of a genotype, in closed form: equal to what the built student counts."""
        self.analysis.check(genotype)
        return self.table.cost(genotype)

    def student(self, source: Genotype | AnyTrial) -> Network:
        """The student of a genotype or of a trial, with weights inherited from the base, or from the library.

        Batch-norm statistics are still the base's: recalibrate them. Raises BudgetError when it is over the budget:
        nothing over it is ever built.
        """
        genotype = source if isinstance(source, Genotype) else self.genotype(source.params)
        if self.budget is not None and not self.budget.admits(self.cost(genotype)):
            raise BudgetError(self.budget.explain(self.cost(genotype)))
        if self.library is not None:
            return cast(Network, self.library.student(genotype))
        return inherit_student(self.base, self.analysis, genotype)

    def damages(self) -> list[NDArray[np.float64]]:
        """Per block over its choices, how much each hurts: as the library measured it, else a prior."""
        return prior_damages(self.table) if self.library is None else self.library.damages()

    def starts(self, count: int = 8) -> list[Genotype]:
        """Up to `count` genotypes within the budget, from cheap to dear, to begin a search with."""
        return mixed_starts(self.table, self.budget, count, None if self.library is None else self.damages())

    def enqueue(self, study: optuna.Study, count: int = 8) -> int:
        """Queues `starts` in a study and returns how many; those that it has already are skipped."""
        starts = self.starts(count)
        for genotype in starts:
            study.enqueue_trial(self.point(genotype), user_attrs={"source": "warm start"}, skip_if_exists=True)
        return len(starts)


def input_size_of(network: nn.Module, img_size: int | None) -> tuple[int, int, int]:
    """The images (C, H, W) that a network takes: its first convolution's channels, the given or its own size."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    if first is not None:
        channels = first.in_channels
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
