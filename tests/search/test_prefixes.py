"""Whoever reads a study takes a trial whose worker died after any of what it was about to note."""

from __future__ import annotations

import io
import itertools
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch import nn

from nas_kd.budget import KINDS, kinds_of
from nas_kd.genotype import Genotype
from nas_kd.pipeline.choosing import choose_front
from nas_kd.pipeline.showcase import _trials
from nas_kd.pipeline.summary import _trial_row
from nas_kd.progress import Stages, console_for
from nas_kd.search.budgets import count_trained
from nas_kd.search.claims import CLAIM, RUNG, claim
from nas_kd.search.sampler import KnapsackSampler
from nas_kd.search.space import Space
from nas_kd.search.trials import DIRECTIONS, _rung_scores, importances, values_of
from nas_kd.search.workers import GENOTYPE, RETRY, WORKER, Watch, lost, retry_dead_trials, retry_lost_trials
from nas_kd.workers.pool import advance_by, line_of

Step = tuple[str, str, Any]  # where it is noted, under which name, what
NOW = ("genotype", "params", "macs", "constraint", "digest", "claim")
BEFORE = ("genotype", "digest", "params", "macs", "constraint", "claim")  # as earlier versions noted it


@pytest.fixture(scope="module")
def genotypes(small: Space[nn.Module]) -> list[Genotype]:
    return small.starts(2)


def steps(space: Space[nn.Module], genotype: Genotype, order: tuple[str, ...]) -> list[Step]:
    """All that a trial notes, in this order."""
    cost = space.cost(genotype)
    noted: dict[str, Step] = {
        "genotype": ("user", GENOTYPE, genotype.to_json()),
        "digest": ("user", "digest", genotype.digest),
        "params": ("user", "params", cost.params),
        "macs": ("user", "macs", cost.macs),
        "constraint": ("system", "constraints:params", -0.5),
        "claim": ("user", CLAIM, True),
    }
    end: list[Step] = [("user", "rung/1", 0.5), ("user", "rung/2", 0.6), ("user", "seconds", 1.0)]
    point: list[Step] = [("param", name, value) for name, value in space.point(genotype).items()]
    return [("user", WORKER, "elsewhere-0000:1"), *point, *(noted[name] for name in order), *end]


def left(space: Space[nn.Module], done: list[Step], state: TrialState, **more: Any) -> FrozenTrial:
    """A trial of which so much was noted."""
    kept = {kind: {name: value for where, name, value in done if where == kind} for kind in ("user", "system", "param")}
    open_: dict[str, CategoricalDistribution] = {name: space.distributions[name] for name in kept["param"]}
    user = {**kept["user"], **more.pop("user_attrs", {})}
    return create_trial(
        state=state, params=kept["param"], distributions=open_, user_attrs=user, system_attrs=kept["system"], **more
    )


@pytest.mark.parametrize("order", [NOW, BEFORE], ids=["now", "before"])
@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.FAIL])
def test_every_prefix_is_read_by_all(
    order: tuple[str, ...], state: TrialState, small: Space[nn.Module], genotypes: list[Genotype]
) -> None:
    whole = steps(small, genotypes[0], order)
    again = {"rung/1": 0.5, RETRY: 0}
    study = optuna.create_study(directions=DIRECTIONS, sampler=KnapsackSampler(small, seed=0))
    study.add_trial(complete(small, genotypes[1]))
    for count in range(len(whole) + 1):
        for kept in ({}, again):
            study.add_trial(left(small, whole[:count], state, user_attrs=kept))
    read_by_all(study, small)


def complete(space: Space[nn.Module], genotype: Genotype) -> FrozenTrial:
    cost = space.cost(genotype)
    done = [*steps(space, genotype, NOW), ("system", f"constraints:{RUNG}", 0.0)]
    return left(space, done, TrialState.COMPLETE, values=[0.6, cost.params, cost.macs])


def read_by_all(study: optuna.Study, space: Space[nn.Module]) -> None:
    found = study.get_trials()
    assert count_trained(study) == 1
    assert len(choose_front(study, 3, space.budget, (1.0,))) == 1
    assert values_of(found[0], space.budget)[0] == 0.6
    assert list(_trials(study)) == [found[0].user_attrs["digest"]]
    assert importances(study) == ()
    with Stages(console_for(io.StringIO()), quiet=True).board("search", 1) as board:
        for trial in found:
            assert _trial_row(trial).number == trial.number
            assert line_of(trial, epochs=2).words.startswith(f"trial {trial.number}")
            advance_by(board, trial)
    new = study.ask()
    genotype = space.suggest_genotype(new)
    space.admit(new, genotype)
    assert claim(new, genotype.digest) is None
    for epoch, kinds in itertools.product((1, 2), (KINDS, kinds_of(space.budget))):
        assert all(score.cost.macs for score in _rung_scores(new, epoch, kinds))
    retry_dead_trials(study)
    watch = Watch(grace=-1)
    for _ in range(2):
        watch.retry_silent_trials(study)
    retry_lost_trials(study)
    assert not lost(study.get_trials())
    space.enqueue(study, 2)
