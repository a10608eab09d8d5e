from __future__ import annotations

import logging
import math
import os
import re
import secrets
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch import nn

from nas_kd.genotype import Genotype
from nas_kd.search.rungs import make_pruner
from nas_kd.search.sampler import make_optuna_sampler
from nas_kd.search.space import Space
from nas_kd.search.storage import close_storage, open_storage, open_study, sqlite_url
from nas_kd.search.trials import (
    DIRECTIONS,
    OBJECTIVES,
    RUNG,
    Objective,
    Proxy,
    best_score,
    cost_of,
    count_trained,
    importances,
    is_trained,
    values_of,
)
from nas_kd.search.work import run_trials
from nas_kd.search.workers import WORKER, retry_dead_trials, worker_name
from nas_kd.training.evaluation import predict_logits

MakeProxy = Callable[..., Proxy]


def new_study(seed: int = 0, sampler: str = "random") -> optuna.Study:
    return optuna.create_study(directions=list(DIRECTIONS), sampler=make_optuna_sampler(sampler, seed))


def finished(space: Space[nn.Module], *, params: int, score: float, state: TrialState = TrialState.COMPLETE) -> Any:
    """Another trial as it is found in the storage."""
    attributes = {"digest": secrets.token_hex(4), "params": params, "macs": params, "rung/1": score}
    values = [score, params, params] if state == TrialState.COMPLETE else None
    return create_trial(state=state, values=values, user_attrs=attributes)


def test_a_small_student_trains_on_one_thread(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    seen = []

    class Noting(Proxy):
        def score(self, student: nn.Module) -> float:
            seen.append(torch.get_num_threads())
            return super().score(student)

    proxy = make_proxy(epochs=1)
    noting = Noting(views=proxy.views, val=proxy.val, recipe=proxy.recipe)
    study = new_study()
    small.enqueue(study, 1)
    torch.set_num_threads(2)
    try:
        run_trials(study, Objective(small, noting), trained=1)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(1)


def test_a_trial_gives_score_and_costs_and_notes_what_it_did(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    study = new_study()
    small.enqueue(study, 1)
    run_trials(study, Objective(small, make_proxy(epochs=2)), trained=1)
    (trial,) = study.get_trials()
    genotype = small.starts(1)[0]
    cost = small.cost(genotype)
    assert trial.state == TrialState.COMPLETE
    assert trial.values[1:] == [cost.params, cost.macs]
    assert cost_of(trial) == cost
    assert trial.values[0] == trial.user_attrs["rung/2"] == best_score(trial)
    assert trial.user_attrs.keys() >= {"rung/1", "seconds", "digest", WORKER}
    assert Genotype.from_json(trial.user_attrs["genotype"]) == genotype
    assert trial.user_attrs["digest"] == genotype.digest
    assert trial.constraints == {"params": pytest.approx(cost.params / small.budget["params"] - 1), RUNG: 0.0}  # type: ignore[index]
    assert len(OBJECTIVES) == len(trial.values)


def test_batch_norms_that_lag_behind_do_not_spoil_a_score(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    proxy = make_proxy()
    student = proxy.prepare(small.student(small.starts(1)[0]))
    score = proxy.score(student)
    wanted = predict_logits(student, proxy.val)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    assert not torch.allclose(predict_logits(student, proxy.val), wanted)
    assert proxy.score(student) == score
    assert torch.equal(predict_logits(student, proxy.val), wanted)


def test_a_digest_is_never_trained_twice(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    study = new_study()
    point = small.point(small.starts(1)[0])
    for _ in range(3):
        study.enqueue_trial(point)
    study.optimize(Objective(small, make_proxy()), n_trials=3)
    first, *others = study.get_trials()
    assert is_trained(first)
    assert [trial.user_attrs["reused"] for trial in others] == [0, 0]
    assert all(trial.values == first.values for trial in others)
    assert not any("rung/1" in trial.user_attrs or "seconds" in trial.user_attrs for trial in others)
    assert count_trained(study) == 1


def test_over_budget_trials_are_free(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    study = new_study()
    study.enqueue_trial(small.point(small.analysis.identity))
    small.enqueue(study, 2)
    ticks: list[FrozenTrial] = []
    run_trials(study, Objective(small, make_proxy()), trained=2, tick=ticks.append)
    over, *rest = study.get_trials()
    assert over.state == TrialState.PRUNED
    assert RUNG not in over.constraints
    assert "over budget: params" in over.user_attrs["reason"]
    assert [trial.state for trial in rest] == [TrialState.COMPLETE] * 2
    assert [is_trained(trial) for trial in ticks] == [False, True, True]


def test_only_the_missing_trials_run(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    study, objective = new_study(), Objective(small, make_proxy())
    small.enqueue(study, 3)
    for trained in (1, 1, 3):
        run_trials(study, objective, trained=trained)
        assert count_trained(study) == trained == len(study.get_trials(states=(TrialState.COMPLETE,)))


def test_a_dominated_trial_stops_at_its_rung(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    study = new_study()
    for score in (1.0, 1.0, 0.99, 0.98):
        study.add_trial(finished(small, params=1, score=score))
    small.enqueue(study, 1)
    study.optimize(Objective(small, make_proxy(epochs=2)), n_trials=1)
    trial = study.get_trials()[-1]
    assert trial.state == TrialState.PRUNED
    assert "rung/2" not in trial.user_attrs
    assert trial.constraints[RUNG] == pytest.approx(0.99 - trial.user_attrs["rung/1"])
    assert "stopped after epoch 1: cheaper students were" in trial.user_attrs["reason"]
    assert is_trained(trial)
    assert best_score(trial) == trial.user_attrs["rung/1"]


def test_dearer_trials_stop_nothing(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    study = new_study()
    for _ in range(4):
        study.add_trial(finished(small, params=10**9, score=1.0, state=TrialState.PRUNED))
    small.enqueue(study, 1)
    study.optimize(Objective(small, make_proxy(epochs=2)), n_trials=1)
    assert study.get_trials()[-1].state == TrialState.COMPLETE


def test_without_front_pruning_every_trial_comes_to_its_end(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    study = new_study()
    for _ in range(4):
        study.add_trial(finished(small, params=1, score=1.0))
    small.enqueue(study, 1)
    study.optimize(Objective(small, make_proxy(epochs=2), front_pruning=False), n_trials=1)
    assert study.get_trials()[-1].state == TrialState.COMPLETE


def new_single_study(pruner: str, epochs: int) -> optuna.Study:
    sampler = make_optuna_sampler("random", 0)
    return optuna.create_study(
        study_name="s",  # decides the brackets of hyperband
        direction="maximize",
        sampler=sampler,
        pruner=make_pruner(pruner, epochs),
    )


@pytest.mark.parametrize("pruner", ["sha", "hyperband", "median"])
def test_with_one_objective_optunas_pruners_stop_trials_at_rungs(
    pruner: str, small: Space[nn.Module], make_proxy: MakeProxy
) -> None:
    study = new_single_study(pruner, 2)
    for number in range(8):
        better = {"digest": str(number), "params": 10**9, "macs": 10**9}
        study.add_trial(
            create_trial(
                value=1.0,
                intermediate_values={1: 1.0, 2: 1.0},
                user_attrs=better,
                system_attrs={"completed_rung_0": 1.0},  # as the halving ones note it
            )
        )
    small.enqueue(study, 2)
    objective = Objective(small, make_proxy(epochs=2))
    study.optimize(objective, n_trials=2)  # hyperband gives each trial a bracket of its own: not all stop early
    stopped = [trial for trial in study.get_trials()[8:] if trial.state == TrialState.PRUNED]
    assert stopped
    for trial in stopped:
        assert list(trial.intermediate_values) == [1]
        assert trial.intermediate_values[1] == trial.user_attrs["rung/1"] == best_score(trial)
        assert re.search(r"stopped after epoch 1 by Optuna's \w+Pruner", trial.user_attrs["reason"])
        assert is_trained(trial)


def test_with_one_objective_the_score_is_reported_and_costs_are_noted(
    small: Space[nn.Module], make_proxy: MakeProxy
) -> None:
    study = new_single_study("none", 2)
    study.enqueue_trial(small.point(small.analysis.identity))
    small.enqueue(study, 1)
    run_trials(study, Objective(small, make_proxy(epochs=2)), trained=1)
    over, trial = study.get_trials()
    assert over.state == TrialState.PRUNED
    assert over.constraints["params"] > 0
    assert trial.values == [trial.intermediate_values[2]]
    assert trial.intermediate_values == {1: trial.user_attrs["rung/1"], 2: trial.user_attrs["rung/2"]}
    cost = small.cost(small.starts(1)[0])
    assert values_of(trial, small.budget) == (trial.values[0], cost.params, cost.macs)
    assert study.best_trial.number == trial.number


def test_a_trial_that_goes_on_reports_the_rungs_that_it_had(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    study = new_single_study("sha", 2)
    point = small.point(small.starts(1)[0])
    study.enqueue_trial(point, user_attrs={"rung/1": 0.75})  # as a dead worker's trial is queued again
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # optuna warns when a step is reported twice
        study.optimize(Objective(small, make_proxy(epochs=2)), n_trials=1)
    (trial,) = study.get_trials()
    assert trial.intermediate_values[1] == 0.75
    assert trial.system_attrs["completed_rung_0"] == 0.75
    assert trial.state == TrialState.COMPLETE


def test_a_loss_that_is_not_finite_ends_the_trial_but_not_the_study(
    small: Space[nn.Module], make_proxy: MakeProxy
) -> None:
    study = new_study()
    small.enqueue(study, 2)
    run_trials(study, Objective(small, make_proxy(lr=1e20)), trained=2)
    trials = study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.PRUNED] * 2
    assert all("finite" in trial.user_attrs["reason"] for trial in trials)
    assert all(trial.constraints[RUNG] == 1.0 for trial in trials)
    assert all(math.isnan(best_score(trial)) for trial in trials)
    run_trials(study, Objective(small, make_proxy()), trained=3)
    assert study.get_trials()[-1].state == TrialState.COMPLETE


def test_a_space_that_is_used_up_ends_the_search_with_a_warning(
    small: Space[nn.Module], make_proxy: MakeProxy, caplog: pytest.LogCaptureFixture
) -> None:
    study = new_study()
    for _ in range(3):
        study.enqueue_trial(small.point(small.starts(1)[0]))
    with caplog.at_level(logging.WARNING):
        run_trials(study, Objective(small, make_proxy()), trained=3, cap=1)
    assert "only 1 of 3 trials trained" in caplog.text


def test_the_same_seed_gives_the_same_trials(small: Space[nn.Module], make_proxy: MakeProxy) -> None:
    def digests(seed: int) -> list[tuple[str, float]]:
        study = new_study(seed, "tpe")
        small.enqueue(study, 1)
        run_trials(study, Objective(small, make_proxy()), trained=3)
        return [(trial.user_attrs["digest"], best_score(trial)) for trial in study.get_trials()]

    first, again, other = digests(1), digests(1), digests(2)
    assert str(first) == str(again) != str(other)


@pytest.mark.filterwarnings("ignore:NSGAIII:optuna.exceptions.ExperimentalWarning")  # optuna
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tpe", optuna.samplers.TPESampler),
        ("nsgaii", optuna.samplers.NSGAIISampler),
        ("nsgaiii", optuna.samplers.NSGAIIISampler),
        ("random", optuna.samplers.RandomSampler),
    ],
)
def test_samplers_by_name_learn_from_trials_of_every_state(
    small: Space[nn.Module], name: str, kind: type[optuna.samplers.BaseSampler]
) -> None:
    study = new_study(0, name)
    assert isinstance(study.sampler, kind)

    def objective(trial: optuna.Trial) -> tuple[float, ...]:
        cost = small.admit(trial, small.suggest_genotype(trial))
        trial.set_constraint(RUNG, 0.0)
        return 0.5, cost.params, cost.macs

    study.optimize(objective, n_trials=25)
    assert {trial.state for trial in study.get_trials()} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_importances_add_up_and_need_some_trials(small: Space[nn.Module]) -> None:
    study = new_study()

    def objective(trial: optuna.Trial) -> tuple[float, ...]:
        cost = small.cost(small.suggest_genotype(trial))
        return 1 - cost.params / 1e6, cost.params, cost.macs

    study.optimize(objective, n_trials=3)
    assert importances(study) == ()
    study.optimize(objective, n_trials=20)
    shares = importances(study)
    assert {name for name, _ in shares} == set(small.distributions)
    assert [share for _, share in shares] == sorted((share for _, share in shares), reverse=True)
    assert sum(share for _, share in shares) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # optuna: heartbeat
@pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")  # optuna: ask without optimize
def test_what_a_dead_process_left_running_is_queued_again(small: Space[nn.Module], tmp_path: Path) -> None:
    storage = open_storage(sqlite_url(tmp_path / "study.db"))
    study = open_study(storage, "s", directions=DIRECTIONS, config={}, sampler=make_optuna_sampler("random", 0))
    small.enqueue(study, 2)
    dead, alive = study.ask(), study.ask()
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = worker_name().rpartition(":")[0]
    dead.set_user_attr(WORKER, f"{host}:{int(gone.stdout)}")
    alive.set_user_attr(WORKER, f"{host}:{os.getpid()}")
    assert retry_dead_trials(study) == 1
    states = [trial.state for trial in study.get_trials()]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    again = study.ask()
    assert small.suggest_genotype(again) == small.starts(2)[0]
    assert again.user_attrs == {"source": "warm start", "retry of": dead.number, "retries": 1, WORKER: worker_name()}
    assert retry_dead_trials(study) == 0
    close_storage(storage)
