"""Structure learning: the width of every block is learnt while the network is distilled, under a budget.

Our reconstruction of paper A (arXiv 2104.09191), of which the abstract alone was at hand (docs/papers.md):

    L = (1 − α)·CE(y, z_s) + α·T²·KL(softmax(z_t/T) ‖ softmax(z_s/T)) + Σ_b λ_b·G_b

G_b is what block b's channels cost (`channel_cost`), as a function of how many of them are in use by the scale
factors of its batch norms. As in MorphNet (arXiv 1711.06798) the gradient of G_b is what a channel costs beside those
of the other blocks as they are. Unlike there a count is (Σ|γ|)²/Σγ² and not Σ|γ|: k for k channels of equal strength,
and the same when all are scaled alike. (A batch norm behind the next convolution takes such a factor out again, so the
sum of |γ| shrinks without a channel being given up.) It is DeepHoyer's Hoyer-square measure (arXiv 1908.09979).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nas_kd.analysis.structure import Analysis, Channels
from nas_kd.budget import KINDS, Budget
from nas_kd.data.images import ImageSet, TrainingData
from nas_kd.errors import BudgetError, GenotypeError
from nas_kd.learnt_widths.channel_cost import channel_cost, segments_of
from nas_kd.learnt_widths.scale_factors import ScaleFactors
from nas_kd.training.evaluation import evaluate
from nas_kd.training.loop import Run, Task, fit, ignore
from nas_kd.training.losses import SoftLoss, student_loss
from nas_kd.training.recipe import Recipe

_FIRST = 5.0  # the λ that a training begins with
_DESCENT = 0.6  # of the steps, in which the cost is led from the base's down to the budget
_PULL, _DAMPING, _FASTEST = 0.5, 10.0, 0.2  # of log λ per step: by the distance, by its change, and at most
_NOTHING = 1e-30  # of Σs²: where all channels are dead, none is missed
_SPARED = 1e-3  # a factor of 0 counts as this much when widths are rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What widths are learnt for: a `budget` on params or MACs, or both; and the user's λ_b as `factors` of the one λ,
    by the name of a block (1 where it is not named; 0: its channels are free).

    `strength` keeps λ at a number instead of leading the cost to the budget. Raises BudgetError for another kind of
    cost, GenotypeError for a factor that is negative or not finite.
    """

    budget: Budget
    factors: Mapping[str, float]
    strength: float | None = None

    def __post_init__(self) -> None:
        if others := [kind for kind in self.budget if kind not in KINDS]:
            raise BudgetError(
                f"structure learning bounds {' or '.join(KINDS)}, not {others[0]}: use python -m nas_kd.study for that"
            )
        for name, factor in self.factors.items():
            if not 0 <= factor < math.inf:
                raise GenotypeError(f"the factor of λ for {name} must be 0 or more, got {factor!r}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearntWidths:
    """What was learnt of S segments with U units (the order of `learnt_widths.channel_cost.segments_of`).

    `counts` (S) of units in use, a real number; `strengths` (U), and for each segment what they are made of, `sources`;
    `shares`, the cost of those counts by kind, in shares of the base's; `lambdas` by kind, as they were at the end.
    `network` has the learnt weights and still all channels.
    """

    network: nn.Module
    counts: NDArray[np.float64]
    strengths: NDArray[np.float64]
    sources: tuple[str, ...]
    shares: Mapping[str, float]
    lambdas: Mapping[str, float]

    def order(self, analysis: Analysis) -> NDArray[np.float64]:
        """For each label the strength of its unit: which channels a width keeps."""
        order = np.zeros(analysis.labels)
        order[np.concatenate([segment.units for segment in segments_of(analysis)])] = self.strengths
        return order

    def damages(self, analysis: Analysis, factors: Mapping[str, float]) -> list[NDArray[np.float64]]:
        """Per block over its choices, how much it hurts: −log of the share of Σs² that stays, over the block's factor.

        So a block is never emptied to spare others. Sums over the segments of the block. To weigh a block's cost by λ_b
        or its damage by 1/λ_b is the same choice.
        """
        order = self.order(analysis)
        damages = []
        for block in analysis.blocks:
            lost = {width: _lost(block.channels, width, order) for width in block.widths}
            weight = max(factors.get(block.name, 1.0), _SPARED)
            damages.append(np.array([lost[choice.width] / weight for choice in block.choices]))
        return damages


def _lost(channels: Sequence[Channels], width: float, order: NDArray[np.float64]) -> float:
    lost = 0.0
    for own in channels:
        for units, kept in zip(own.segments, own.kept(width), strict=True):
            energies = np.sort(order[units] ** 2)[::-1]
            lost -= math.log((energies[:kept].sum() + _NOTHING) / (energies.sum() + _NOTHING))
    return lost


def learn_widths(
    learner: WidthLearner,
    data: TrainingData,
    recipe: Recipe,
    *,
    val: ImageSet | None = None,
    report: Callable[[int, float], None] = ignore,
    run: Run | None = None,
) -> LearntWidths:
    """Distils the learner's network while λ leads the cost of its channels in use down to the budget.

    The cost is led along a straight line in the first part of the steps, and held after it: λ rises while the cost is
    above the line and falls while it is below, so that one training lands on the budget. All else is as in `loop.fit`.
    """
    learner.begin(recipe.epochs * math.ceil(len(data) / recipe.batch_size))
    task = Task(
        network=learner,
        criterion=functools.partial(
            structure_loss, learner=learner, distill_weight=recipe.distill_weight, soft=recipe.make_soft_loss()
        ),
        measure=None if val is None else functools.partial(evaluate, images=val),
    )
    fit(task, data, recipe, report=report, run=run or Run())
    return learner.learnt()


def structure_loss(
    outputs: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    *,
    learner: WidthLearner,
    distill_weight: float,
    soft: SoftLoss,
) -> Tensor:
    """(1 − α)·CE + α·soft + Σ_b λ_b·G_b, α the `distill_weight`: a criterion. λ moves a step with every call."""
    loss = student_loss(outputs, labels, teacher_logits, distill_weight=distill_weight, soft=soft)
    return loss + learner.step().to(loss.dtype)


def effective_count(strengths: Tensor, scales: ScaleFactors) -> Tensor:
    """How many units of each segment are in use: (Σ|γ|)²/Σγ², U → S. k for k units of equal strength, else less."""
    sums, squares = scales.per_segment(strengths), scales.per_segment(strengths.square())
    return sums.square() / squares.clamp_min(torch.finfo(squares.dtype).tiny)


class WidthLearner(nn.Module):
    """A network whose channels in use cost it: N×C×H×W → its logits.

    It begins as a copy of `base`. The state of λ is in buffers, so that a killed training goes on with it. Raises
    GenotypeError for a factor of a block that there is not.
    """

    lambdas: Tensor  # K: per bound of the budget
    excess: Tensor  # K: how far the cost was over its line at the last step, as a fraction
    steps_done: Tensor

    def __init__(self, base: nn.Module, analysis: Analysis, goal: Goal) -> None:
        super().__init__()
        for name in goal.factors:
            analysis.block(name)
        self.network, self.goal, self.steps = copy.deepcopy(base), goal, 1
        self.scales = ScaleFactors(self.network, analysis)
        device, segments = self.scales.segment.device, segments_of(analysis)
        self.cost = channel_cost(analysis, base).to(device)
        everything = torch.tensor([float(len(s.units)) for s in segments], dtype=torch.float64)
        self.base = self.cost.total(everything.to(device))[self._columns()]
        self.least = torch.tensor([float(s.least) for s in segments], dtype=torch.float64).to(device)
        factors = [goal.factors.get(block.name, 1.0) for block in analysis.blocks]
        self.factors = torch.tensor(factors, dtype=torch.float64).to(device)
        self.bounds = torch.tensor([bound for _, bound in goal.budget.items()], dtype=torch.float64).to(device)
        first = _FIRST if goal.strength is None else goal.strength
        self.register_buffer("lambdas", torch.full_like(self.bounds, first))
        self.register_buffer("excess", torch.zeros_like(self.bounds))
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.float64, device=device))
        with torch.no_grad():
            self.first_shares = self.cost.total(self.counts())[self._columns()] / self.base

    def _columns(self) -> list[int]:
        return [KINDS.index(kind) for kind in self.goal.budget]

    def forward(self, images: Tensor) -> Tensor:
        """The network's logits."""
        logits: Tensor = self.network(images)
        return logits

    def begin(self, steps: int) -> None:
        """Says how many steps the training takes, so that λ can be led."""
        self.steps = steps

    def counts(self) -> Tensor:
        """The units of each segment in use (S), no fewer than its narrowest open width keeps; differentiable."""
        return torch.maximum(effective_count(self.scales.strengths(), self.scales), self.least)

    def step(self) -> Tensor:
        """Σ_b λ_b·G_b, G_b in shares of the base's cost, summed over the bounds; moves λ unless it is fixed."""
        counts = self.counts()
        if self.goal.strength is None:
            self._steer(self.cost.total(counts.detach())[self._columns()] / self.base)
        costs = self.cost.by_block(counts)[:, self._columns()] / self.base  # B×K
        return self.factors @ costs @ self.lambdas.clone()  # the buffer changes before the gradient is taken

    @torch.no_grad()
    def _steer(self, shares: Tensor) -> None:
        """Moves λ by how far the cost is from the line that leads it to the budget, and by how that changed."""
        wanted = self.bounds / self.base
        done = (self.steps_done / (_DESCENT * self.steps)).clamp(max=1)
        excess = shares / (self.first_shares + (wanted - self.first_shares) * done) - 1
        change = torch.where(self.steps_done > 0, excess - self.excess, 0.0)
        self.lambdas.mul_((_PULL * excess + _DAMPING * change).clamp(-_FASTEST, _FASTEST).exp())
        self.excess.copy_(excess)
        self.steps_done.add_(1)

    @torch.no_grad()
    def shares(self) -> dict[str, float]:
        """The cost of the channels in use by kind, in shares of the base's."""
        shares = self.cost.total(self.counts())[self._columns()] / self.base
        return dict(zip(self.goal.budget, shares.tolist(), strict=True))

    @torch.no_grad()
    def learnt(self) -> LearntWidths:
        """What has been learnt so far."""
        return LearntWidths(
            network=self.network,
            counts=self.counts().cpu().numpy(),
            strengths=self.scales.strengths().cpu().numpy(),
            sources=self.scales.sources,
            shares=self.shares(),
            lambdas=dict(zip(self.goal.budget, self.lambdas.tolist(), strict=True)),
        )
