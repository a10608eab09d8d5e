"""The trials of a study: each proposes a genotype, is priced, and if it is within budget trains a short proxy."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from nas_kd.budget import KINDS, Budget, Cost, kinds_of
from nas_kd.costs.latency import limited_threads
from nas_kd.data.images import ImageSet
from nas_kd.errors import TrainingError
from nas_kd.genotype import Genotype
from nas_kd.search.budgets import cost_of as cost_of
from nas_kd.search.budgets import count_trained as count_trained
from nas_kd.search.budgets import noted_cost
from nas_kd.search.claims import REUSED, RUNG, claim
from nas_kd.search.claims import is_trained as is_trained
from nas_kd.search.rungs import RungScore, deficit, rung_epochs, rung_scores
from nas_kd.search.signals import at_once, held
from nas_kd.search.space import Space
from nas_kd.search.storage import Direction
from nas_kd.search.workers import WORKER, worker_name
from nas_kd.training.evaluation import CALIBRATION, LOOK_CALIBRATION, evaluate, recalibrate
from nas_kd.training.loop import Run, fit, ignore, student_task
from nas_kd.training.recipe import Recipe
from nas_kd.training.views import OnlineViews, Views

SCORE = "accuracy"  # the name of the first objective
_SMALL = 2e8  # MACs forward of a batch: threads then wait for each other longer than they work, docs/decisions.md
_logger = logging.getLogger(__name__)


OBJECTIVES = (SCORE, *KINDS)  # the score is maximised, every cost minimised
_COST_DIRECTION: Direction = "minimize"
DIRECTIONS: tuple[Direction, ...] = ("maximize", *(_COST_DIRECTION for _ in KINDS))


def objectives(budget: Budget | None, maximize: str | None = None) -> dict[str, Direction]:
    """The objectives of a study within `budget`, in order: `maximize` alone, or `OBJECTIVES` and what else the budget
    bounds."""
    if maximize:
        return {maximize: "maximize"}
    return {SCORE: "maximize", **{kind: _COST_DIRECTION for kind in kinds_of(budget)}}


def values_of(trial: FrozenTrial, budget: Budget | None) -> tuple[float, ...]:
    """The score of a trained trial and its costs, whatever the study's objectives are."""
    cost = cost_of(trial)
    return (best_score(trial), *(float(cost[kind]) for kind in kinds_of(budget)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Proxy:
    """What every trial trains on and how: the same images in the same order for every genotype.

    Where there are `checkpoints`, a folder, a trial that was killed goes on from its last rung."""

    views: Views | OnlineViews
    val: ImageSet
    recipe: Recipe
    device: str = "cpu"
    checkpoints: Path | None = None

    def prepare(self, student: nn.Module) -> nn.Module:
        """Moves a student to the device and recalibrates its batch norms on augmented training images."""
        student = student.to(self.device)
        recalibrate(student, self.views.sample(CALIBRATION))
        return student

    def score(self, student: nn.Module) -> float:
        """The validation accuracy of a student at a rung, its batch norms recalibrated: while weights move fast, the
        running averages lag behind them."""
        recalibrate(student, self.views.sample(LOOK_CALIBRATION))
        return evaluate(student, self.val)

    @property
    def in_rungs(self) -> Recipe:
        """The recipe, with a look at every rung."""
        return dataclasses.replace(self.recipe, eval_epochs=rung_epochs(self.recipe.epochs))

    def checkpoint(self, genotype: Genotype) -> Path | None:
        """The file that keeps the state of a genotype's training, if any does."""
        return None if self.checkpoints is None else self.checkpoints / f"{genotype.digest}.resume"

    def train(
        self,
        student: nn.Module,
        macs: int,
        *,
        checkpoint: Path | None,
        threads: int | None = None,
        report: Callable[[int, float], None] = ignore,
    ) -> float:
        """Trains a student, from where its checkpoint left it, on so many `threads` (None: all that there are, one for
        a student that is small on a CPU); `report` is told its score at each rung. Returns the last."""
        is_small = self.device == "cpu" and macs * self.recipe.batch_size < _SMALL
        with limited_threads(1 if is_small else threads):
            task = student_task(self.prepare(student), self.in_rungs, self.score)
            run = Run(checkpoint=checkpoint, again=True)
            return fit(task, self.views, self.in_rungs, report=report, run=run).accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What was done for a trial before it came to train: `seconds` of training, and the `scores` (epoch, score) at
    rungs that this gave; it goes on with so many `threads`."""

    seconds: float = 0.0
    threads: int | None = None
    scores: tuple[tuple[int, float], ...] = ()


def begin_here(genotype: Genotype) -> Begun:
    """Nothing was done before."""
    return Begun()


class Objective:
    """Called with a trial, gives its score and costs; for `study.optimize` of a study with `DIRECTIONS`, where trials
    stop at rungs at which they are behind, if there is a `front_pruning`. In a study with one objective it gives the
    score alone, and the study's own pruner decides.

    What it writes and reads of the study is never interrupted by a signal, its training is. `begin` is called before
    each training, and waits for whoever is at it.
    """

    def __init__(
        self,
        space: Space[Any],
        proxy: Proxy,
        *,
        front_pruning: bool = True,
        begin: Callable[[Genotype], Begun] = begin_here,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.space, self.proxy, self.front_pruning, self.clock = space, proxy, front_pruning, clock
        self.begin = begin

    def __call__(self, trial: optuna.Trial) -> tuple[float, ...]:
        with held():
            if trial.user_attrs.get(WORKER) != worker_name():
                trial.set_user_attr(WORKER, worker_name())
            genotype = self.space.suggest_genotype(trial)
            cost = self.space.admit(trial, genotype)
            known = claim(trial, genotype.digest, sleep=_sleep)
            if known is not None:
                return _reuse(trial, known)
        begun, started = self.begin(genotype), self.clock()
        with self._checkpoint(genotype) as checkpoint:
            score = self._train(trial, genotype, cost, checkpoint, begun)
        with held():
            trial.set_user_attr("seconds", round(begun.seconds + self.clock() - started, 3))
            trial.set_constraint(RUNG, 0.0)
        kinds = kinds_of(self.space.budget)
        return (score,) if _is_single(trial) else (score, *(float(cost[kind]) for kind in kinds))

    @contextmanager
    def _checkpoint(self, genotype: Genotype) -> Iterator[Path | None]:
        """Where the trial's state is kept; a trial that ends needs it no more, one that is interrupted does."""
        path = self.proxy.checkpoint(genotype)
        try:
            yield path
        except optuna.TrialPruned:
            _remove(path)
            raise
        _remove(path)

    def _train(
        self, trial: optuna.Trial, genotype: Genotype, cost: Cost, checkpoint: Path | None, begun: Begun
    ) -> float:
        """The score; of a trial that goes on, what it has at its rungs is looked at first, and may be all there is: no
        student is built then."""

        def report(epoch: int, accuracy: float) -> None:
            if epoch in scores:
                return
            scores[epoch] = accuracy
            with held():
                trial.set_user_attr(f"rung/{epoch}", accuracy)
                self._look(trial, epoch, RungScore(cost=cost, score=accuracy))

        scores = dict(rung_scores(trial.user_attrs))
        for epoch, accuracy in tuple(scores.items()):
            with held():
                self._look(trial, epoch, RungScore(cost=cost, score=accuracy))
        for epoch, accuracy in begun.scores:
            report(epoch, accuracy)
        if self.proxy.recipe.epochs in scores:
            return scores[self.proxy.recipe.epochs]
        student = self.space.student(genotype)
        try:
            return self.proxy.train(student, cost.macs, checkpoint=checkpoint, threads=begun.threads, report=report)
        except TrainingError as error:
            _note_end(trial, str(error), 1.0)
            raise optuna.TrialPruned(str(error)) from error

    def _look(self, trial: optuna.Trial, epoch: int, own: RungScore) -> None:
        """Raises optuna.TrialPruned for a trial that is to stop at this rung."""
        (self._look_as_optuna if _is_single(trial) else self._look_at_front)(trial, epoch, own)

    def _look_at_front(self, trial: optuna.Trial, epoch: int, own: RungScore) -> None:
        """Stops a trial that is behind; with a constraint, which is what samplers learn from where nothing can be
        reported."""
        if epoch >= self.proxy.recipe.epochs or not self.front_pruning:
            return
        kinds = kinds_of(self.space.budget)
        behind = deficit(own, _rung_scores(trial, epoch, kinds), kinds=kinds)
        if behind > 0:
            reason = f"stopped after epoch {epoch}: cheaper students were {100 * behind:.1f} points better there"
            _note_end(trial, reason, behind)
            raise optuna.TrialPruned(reason)

    def _look_as_optuna(self, trial: optuna.Trial, epoch: int, own: RungScore) -> None:
        """Reports to Optuna's pruner, which may stop the trial; samplers learn from what was reported."""
        frozen = trial.storage.get_trial(trial._trial_id)
        if epoch in frozen.intermediate_values:
            return
        trial.report(own.score, epoch)
        if epoch < self.proxy.recipe.epochs and trial.should_prune():
            reason = f"stopped after epoch {epoch} by Optuna's {type(trial.study.pruner).__name__}"
            _note_end(trial, reason, 0.0)
            raise optuna.TrialPruned(reason)


def _sleep(seconds: float) -> None:
    """Waits for another worker, which a signal may interrupt."""
    with at_once():
        time.sleep(seconds)


def _note_end(trial: optuna.Trial, reason: str, behind: float) -> None:
    """Why a trial that trained was stopped, and how far behind it was."""
    with held():
        trial.set_user_attr("reason", reason)
        trial.set_constraint(RUNG, behind)


def _is_single(trial: optuna.Trial) -> bool:
    return len(trial.study.directions) == 1


def _remove(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)


def _reuse(trial: optuna.Trial, known: FrozenTrial) -> tuple[float, ...]:
    """The result of the trial that trained the same genotype; where there is none, the trial is pruned."""
    trial.set_user_attr(REUSED, known.number)
    trial.set_constraint(RUNG, known.constraints.get(RUNG, 0.0))
    if known.state == TrialState.COMPLETE:
        return tuple(known.values)
    what = "was stopped with" if known.state.is_finished() else "trains"
    reason = f"trial {known.number} {what} the same student"
    trial.set_user_attr("reason", reason)
    raise optuna.TrialPruned(reason)


def _rung_scores(trial: optuna.Trial, epoch: int, kinds: Sequence[str]) -> list[RungScore]:
    """What the study's other students scored at this rung, each once, however often its trial was interrupted."""
    rung, own = f"rung/{epoch}", str(trial.user_attrs.get("digest"))
    scores = {
        str(other.user_attrs["digest"]): RungScore(
            cost=cost,
            score=other.user_attrs[rung],
            end=other.values[0] if other.state == TrialState.COMPLETE else None,
        )
        for other in trial.study.get_trials(deepcopy=False)
        if other.number != trial.number and {rung, "digest"} <= other.user_attrs.keys()
        if (cost := noted_cost(other, kinds)) is not None
    }
    scores.pop(own, None)
    return list(scores.values())


def best_score(trial: FrozenTrial) -> float:
    """The score of a trial: its first value, or what it had at its last rung when it stopped; NaN without any."""
    if trial.values:
        return float(trial.values[0])
    rungs = rung_scores(trial.user_attrs)
    return rungs[-1][1] if rungs else math.nan


def importances(study: optuna.Study) -> tuple[tuple[str, float], ...]:
    """Each parameter's share of the variance of the score, largest first; empty with too few finished trials."""
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < 4:
        return ()
    try:
        with warnings.catch_warnings():  # of the sign, which is given here, and of equal importances after few trials
            warnings.simplefilter("ignore", UserWarning)
            shares = optuna.importance.get_param_importances(study, target=lambda trial: -trial.values[0])
    except (ValueError, RuntimeError) as error:
        _logger.warning("no parameter importances: %s", error)
        return ()
    return tuple(shares.items())
