"""The students that a search begins with are trained side by side, ahead of their trials.

Which they are is known before the first trial, what the others are is not. Each is trained by the study or by a helper,
up to its last rung; its trial then goes on from the state that was kept, as after a kill, and decides as it would have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from torch import nn

from nas_kd.costs.latency import limited_threads
from nas_kd.errors import TrainingError
from nas_kd.genotype import Genotype
from nas_kd.pipeline.helpers import Claims, Helpers, pass_over, processes
from nas_kd.preparation.estimate import predicted_seconds
from nas_kd.preparation.job import Job, proxy_recipe_of
from nas_kd.preparation.materials import Materials
from nas_kd.progress import Advance
from nas_kd.search.space import Space
from nas_kd.search.trials import Begun, Proxy, begin_here
from nas_kd.search.workers import queued_point
from nas_kd.workers.crew import share_of_threads

STAGE = "trials"
WORTH, BEGIN = 2.0, 15.0  # predicted seconds must be left of them, more where a helper has to begin first
_POLL = 0.05


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
    threads: int

    def begin(self, genotype: Genotype) -> Begun:
        """Before a trial trains: waits until no helper is at its student, and trains others meanwhile."""
        if genotype not in self.queued:
            return Begun()
        number = self.queued.index(genotype)
        if self.claims.take(number, lambda tell: None, pass_over):
            return Begun(threads=self.threads)
        while (seconds := self.claims.seconds(number)) is None:
            if not self._train_one():
                time.sleep(_POLL)
        return Begun(threads=self.threads, seconds=seconds)

    def _train_one(self) -> bool:
        """Trains one that nobody has taken, if there is one."""
        return any(self.claims.take(number, self._training(own), pass_over) for number, own in enumerate(self.queued))

    def _training(self, genotype: Genotype) -> functools.partial[None]:
        return functools.partial(train_ahead, self.space, self.proxy, genotype, self.threads)


@contextlib.contextmanager
def training_ahead(helpers: Helpers | None, study: optuna.Study, proxy: Proxy) -> Iterator[Any]:
    """Inside the block helpers train what is queued in a study, where that pays; what the block gets is for an
    `Objective` to begin with."""
    if helpers is None:
        yield begin_here
        return
    job, queued = helpers.job, _queued(helpers.job, study)
    count = processes(job, len(queued)) if _is_worth(helpers, len(queued)) else 1
    if count == 1:
        yield begin_here
        return
    threads = share_of_threads(count)
    plan = {"genotypes": [own.to_json() for own in queued], "checkpoints": str(proxy.checkpoints)}
    with limited_threads(threads):
        claims = helpers.share(STAGE, plan, count)
    yield Ahead(space=job.space, proxy=proxy, claims=claims, queued=queued, threads=threads).begin


def _queued(job: Job, study: optuna.Study) -> list[Genotype]:
    """What waits in a study, within its budget, in the order in which it will be tried."""
    points = map(queued_point, study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
    whole = (point for point in points if point.keys() == job.space.distributions.keys())
    found = dict.fromkeys(job.space.genotype(point) for point in whole)
    return [own for own in found if job.budget.admits(job.space.cost(own))]


def _is_worth(helpers: Helpers, count: int) -> bool:
    seconds = predicted_seconds(helpers.job, 0, 0)["search"] * count / helpers.job.settings.trials
    return seconds >= (WORTH if helpers.others else BEGIN)


def train_queued(job: Job, materials: Materials, plan: Mapping[str, Any], claims: Claims) -> None:
    """A helper's part of what is queued."""
    threads = plan["threads"]
    proxy = proxy_of(job, materials, Path(plan["checkpoints"]))

    def train(genotype: Genotype, tell: Advance) -> None:
        train_ahead(job.space, proxy, genotype, threads, tell)

    claims.work([Genotype.from_json(own) for own in plan["genotypes"]], train, pass_over)


def train_ahead(space: Space[nn.Module], proxy: Proxy, genotype: Genotype, threads: int, tell: Advance) -> None:
    """Trains the student of a genotype to its last rung, and keeps its state for its trial."""
    checkpoint = proxy.checkpoint(genotype)
    # one that cannot be trained is told of by its trial
    with contextlib.suppress(TrainingError):
        proxy.train(space.student(genotype), space.cost(genotype).macs, checkpoint=checkpoint, threads=threads)
