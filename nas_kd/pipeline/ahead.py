"""Trials in rounds: what is queued in a study is trained side by side, each student ahead of its trial.

A search begins with genotypes that are known before the first trial; then so many are proposed at a time, each as if
those before it were in training. A student is trained by the study or by a helper, up to its last rung; its trial then
goes on from the state that was kept, as after a kill, and decides as it would have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from torch import nn

from nas_kd.budget import MEASURED
from nas_kd.costs.latency import limited_threads
from nas_kd.errors import TrainingError
from nas_kd.genotype import Genotype
from nas_kd.pipeline.helpers import Claims, Helpers, pass_over, processes
from nas_kd.preparation.estimate import predicted_seconds
from nas_kd.preparation.job import Job, proxy_recipe_of
from nas_kd.preparation.materials import Materials
from nas_kd.progress import Advance
from nas_kd.search.sampler import KnapsackSampler
from nas_kd.search.space import Space
from nas_kd.search.trials import Begun, Proxy, begin_here, count_trained
from nas_kd.search.workers import queued_point
from nas_kd.workers.pool import share_of_threads

STAGE = "trials"
ROUND = 8  # that are proposed at a time, or one for each process: docs/results/samplers.md
WORTH, BEGIN = 2.0, 15.0  # predicted seconds must be left of the search, more where a helper has to begin first
_ASKS = 3  # proposals at most for each that is wanted
_POLL = 0.05

Begin = Callable[[Genotype], Begun]
Scores = list[tuple[int, float]]  # by epoch, at rungs


def proxy_of(job: Job, materials: Materials, checkpoints: Path) -> Proxy:
    """What the trials of a study train on and how; their states are kept in a folder."""
    return Proxy(
        views=materials.proxy_views,
        val=materials.sample.val,
        recipe=proxy_recipe_of(job.settings),
        device=str(job.device),
        checkpoints=checkpoints,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ahead:
    """The trials that are `queued`, by the numbers of their parts, of which helpers take some; each trains on so many
    `threads`, whoever trains it."""

    space: Space[nn.Module]
    proxy: Proxy
    claims: Claims
    queued: Sequence[Genotype]
    threads: int | None

    def begin(self, genotype: Genotype) -> Begun:
        """Before a trial trains: waits until no helper is at its student, and trains others meanwhile."""
        if genotype not in self.queued:
            return Begun()
        number = self.queued.index(genotype)
        if self.claims.take(number, lambda tell: None, pass_over):
            return Begun(threads=self.threads)
        while (made := self.claims.made(number)) is None:
            if not self.train_one():
                time.sleep(_POLL)
        scores = tuple((int(epoch), float(score)) for epoch, score in made.note or ())
        return Begun(threads=self.threads, seconds=made.seconds, scores=scores)

    def train_one(self) -> bool:
        """Trains one that nobody has taken, if there is one."""
        return any(self.claims.take(number, self._training(number), pass_over) for number in self._dearest_first)

    @functools.cached_property
    def _dearest_first(self) -> list[int]:
        """In which order students are trained ahead: so all processes end at about the same time."""
        macs = [self.space.cost(genotype).macs for genotype in self.queued]
        return sorted(range(len(macs)), key=lambda number: -macs[number])

    def _training(self, number: int) -> Callable[[Advance], Scores]:
        return lambda tell: train_ahead(self.space, self.proxy, self.queued[number], self.threads)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rounds:
    """The rounds of a study's search that `count` processes share."""

    job: Job
    helpers: Helpers
    study: optuna.Study
    proxy: Proxy
    count: int

    def __iter__(self) -> Iterator[tuple[Begin, int]]:
        """For each round what trials begin with, and how many of them train: those that are queued, else proposed now;
        until the study has as many as it wants, or a round brought none."""
        before, trials = -1, self.job.settings.search.trials
        while before < (trained := count_trained(self.study)) < trials:
            before, missing = trained, trials - trained
            queued = (_queued(self.job, self.study) or self._propose(min(missing, max(ROUND, self.count))))[:missing]
            yield self._share(queued, number=trained), len(queued) or missing

    def _propose(self, count: int) -> list[Genotype]:
        """Queues the next genotypes, measured where the budget bounds what is measured: now, before processes are busy;
        a slow one is queued, too, to be told of."""
        sampler, space, budget = self.study.sampler, self.job.space, self.job.budget
        if not isinstance(sampler, KnapsackSampler):
            return []
        # a bound that was asked for is near what is proposed: each measurement corrects what the next is proposed by
        one_by_one = any(kind in budget and kind not in budget.fixed for kind in MEASURED)
        found, proposed = list[Genotype](), list[Genotype]()
        while len(found) < count and len(proposed) < _ASKS * count:
            some = sampler.propose(self.study, 1 if one_by_one else count - len(found), proposed)
            space.confirm(some)
            for genotype in some:
                self.study.enqueue_trial(space.point(genotype))
            proposed += some
            found += [genotype for genotype in some if budget.admits(space.cost(genotype))]
        return found

    def _share(self, queued: Sequence[Genotype], number: int) -> Begin:
        if len(queued) < 2:
            return begin_here
        threads = share_of_threads(self.count)
        plan = {"genotypes": [own.to_json() for own in queued], "checkpoints": str(self.proxy.checkpoints)}
        with limited_threads(threads):
            claims = self.helpers.share(f"{STAGE}-{number}", plan, self.count)
        ahead = Ahead(space=self.job.space, proxy=self.proxy, claims=claims, queued=queued, threads=threads)
        return ahead.begin


def rounds_of(job: Job, helpers: Helpers | None, study: optuna.Study, proxy: Proxy) -> Rounds | None:
    """The rounds of a search; None where one process does it all, one trial after the other."""
    if helpers is None:
        return None
    trials = job.settings.search.trials - count_trained(study)
    seconds = predicted_seconds(job, 0, 0)["search"] * trials / job.settings.search.trials
    count = processes(job, trials) if seconds >= (WORTH if helpers.others else BEGIN) else 1
    return None if count == 1 else Rounds(job=job, helpers=helpers, study=study, proxy=proxy, count=count)


def _queued(job: Job, study: optuna.Study) -> list[Genotype]:
    """What waits in a study, within its budget, in the order in which it will be tried."""
    points = map(queued_point, study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
    whole = (point for point in points if point.keys() == job.space.distributions.keys())
    found = dict.fromkeys(job.space.genotype(point) for point in whole)
    return [own for own in found if job.budget.admits(job.space.cost(own))]


def train_queued(job: Job, materials: Materials, plan: Mapping[str, Any], claims: Claims) -> None:
    """A helper's part of what is queued."""
    queued = [Genotype.from_json(own) for own in plan["genotypes"]]
    proxy = proxy_of(job, materials, Path(plan["checkpoints"]))
    # with a helper's threads, which it has already
    ahead = Ahead(space=job.space, proxy=proxy, claims=claims, queued=queued, threads=None)
    while ahead.train_one():
        pass


def train_ahead(space: Space[nn.Module], proxy: Proxy, genotype: Genotype, threads: int | None) -> Scores:
    """Trains the student of a genotype to its last rung, and keeps its state, with which its trial goes on after a
    kill. Returns its scores at its rungs; they end early where it cannot be trained, which its trial tells of."""
    scores: Scores = []
    with contextlib.suppress(TrainingError):
        proxy.train(
            space.student(genotype),
            space.cost(genotype).macs,
            checkpoint=proxy.checkpoint(genotype),
            threads=threads,
            report=lambda epoch, score: scores.append((epoch, score)),
        )
    return scores
