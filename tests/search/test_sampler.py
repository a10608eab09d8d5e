from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import optuna
import pytest
import timm
from numpy.typing import NDArray
from space_fixtures import BASES
from torch import nn

from nas_kd.budget import Budget, kinds_of
from nas_kd.genotype import Genotype
from nas_kd.search.additive import features_of, fit_scores
from nas_kd.search.sampler import KnapsackSampler, make_sampler
from nas_kd.search.solver import solve
from nas_kd.search.space import Space
from nas_kd.search.starts import feasible_starts, prior_damages

Within = Callable[[Space[nn.Module], str | Budget], Space[nn.Module]]

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture(scope="module")
def tight() -> Space[nn.Module]:
    """ResNet-18 within 1 M parameters: a random genotype is within once in some hundred."""
    return Space(timm.create_model("resnet18", num_classes=10), budget="params=1M,macs=20%", img_size=32)


def additive_truth(space: Space[nn.Module], seed: int) -> list[NDArray[np.float64]]:
    """Damages like the prior, but every block and every choice differs from it."""
    generator = np.random.default_rng(seed)
    priors = prior_damages(space.table)
    return [p * np.exp(generator.normal(0, 0.8)) * np.exp(generator.normal(0, 0.5, len(p))) for p in priors]


def score_of(space: Space[nn.Module], damages: list[NDArray[np.float64]], genotype: Genotype) -> float:
    return 0.95 - 0.25 * sum(d[i] for d, i in zip(damages, space.table.indices(genotype), strict=True))


def search(
    space: Space[nn.Module], sampler: optuna.samplers.BaseSampler, damages: list[NDArray[np.float64]], trials: int
) -> list[Genotype]:
    """The genotypes of an ask-and-tell study; over-budget proposals are pruned and do not count."""
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
    return search_on(study, space, damages, trials)


def search_on(
    study: optuna.Study, space: Space[nn.Module], damages: list[NDArray[np.float64]], trials: int
) -> list[Genotype]:
    space.enqueue(study)
    found: list[Genotype] = []
    while len(found) < trials:
        trial = study.ask()
        genotype = space.suggest_genotype(trial)
        try:
            cost = space.admit(trial, genotype)
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        found.append(genotype)
        study.tell(trial, (score_of(space, damages, genotype), cost.params, cost.macs))
    return found


def test_every_proposal_is_within_every_bound_and_new(tight: Space[nn.Module]) -> None:
    assert tight.budget is not None
    damages = additive_truth(tight, 0)
    found = search(tight, KnapsackSampler(tight, seed=0), damages, 25)
    assert all(tight.budget.admits(tight.cost(genotype)) for genotype in found)
    assert len(set(found)) == len(found)


BUDGETS = ("params=30%", "macs=20%,params=40%", "peak_memory=100%,size=30%")
# the solver takes long over VGG: every budget of it is for the long run
SLOW = [("vgg11_bn", budget) for budget in BUDGETS[:2]]
PAIRS = [
    pytest.param(*pair, marks=pytest.mark.slow if pair in SLOW else ()) for pair in itertools.product(BASES, BUDGETS)
]


@pytest.mark.parametrize(("space", "budget"), PAIRS, indirect=["space"])
def test_no_proposal_is_over_any_kind_of_budget(space: Space[nn.Module], within: Within, budget: str) -> None:
    limited = within(space, budget)
    assert limited.budget is not None
    assert solve(limited.table, limited.budget) is not None
    kinds, generator = kinds_of(limited.budget), np.random.default_rng(0)
    directions = ["maximize", *("minimize" for _ in kinds)]
    study = optuna.create_study(directions=directions, sampler=KnapsackSampler(limited, seed=0))
    found = []
    for _ in range(6):
        trial = study.ask(dict(limited.distributions))
        found.append(limited.genotype(trial.params))
        cost = limited.cost(found[-1])
        assert limited.budget.admits(cost)
        study.tell(trial, [float(generator.random()), *(float(cost[kind]) for kind in kinds)])
    assert len(set(found)) == len(found)


def test_what_others_train_is_not_proposed_again(
    tight: Space[nn.Module],
) -> None:
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=KnapsackSampler(tight, seed=0))
    search_on(study, tight, additive_truth(tight, 0), 10)
    running = [study.ask(dict(tight.distributions)).params for _ in range(8)]
    found = [tight.genotype(point) for point in running]
    assert len(set(found)) == len(found)
    assert not set(found) & {tight.genotype(t.params) for t in study.get_trials() if t.state.is_finished()}


def test_proposals_for_the_same_time_are_new_and_begin_as_a_trial_would(tight: Space[nn.Module]) -> None:
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=KnapsackSampler(tight, seed=0))
    search_on(study, tight, additive_truth(tight, 0), 10)
    before = {tight.genotype(trial.params) for trial in study.get_trials()}
    sampler = KnapsackSampler(tight, seed=0)
    found = sampler.propose(study, 6)
    assert tight.budget is not None
    assert all(tight.budget.admits(tight.cost(genotype)) for genotype in found)
    assert len(set(found)) == len(found)
    assert not set(found) & before
    one_by_one = list[Genotype]()
    for _ in found:
        one_by_one += sampler.propose(study, 1, one_by_one)
        study.enqueue_trial(tight.point(one_by_one[-1]))
    assert one_by_one == found
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=KnapsackSampler(tight, seed=0))
    search_on(study, tight, additive_truth(tight, 0), 10)
    assert tight.genotype(study.ask(dict(tight.distributions)).params) == found[0]


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        (("params", "macs"), ("params", "macs")),
        (("macs",), ("macs",)),
        (("other",), ("params",)),  # nothing that is known of: the first of the command line's
        ((), ()),
    ],
)
def test_the_costs_among_the_values_are_the_objectives(
    tight: Space[nn.Module], values: tuple[str, ...], kinds: tuple[str, ...]
) -> None:
    sampler = KnapsackSampler(tight, seed=0)
    study = optuna.create_study(directions=["maximize", *("minimize" for _ in values)], sampler=sampler)
    for genotype in feasible_starts(tight.table, tight.budget, 3):
        study.enqueue_trial(tight.point(genotype))
        trial, cost = study.ask(dict(tight.distributions)), tight.cost(genotype)
        study.tell(trial, [0.5, *(0.25 if value == "other" else float(cost[value]) for value in values)])
    had = [(trial, tight.table.indices(tight.genotype(trial.params))) for trial in study.get_trials()]
    assert sampler._objectives(had, len(values)) == kinds


def test_with_one_objective_the_whole_budget_or_a_level_is_used(tight: Space[nn.Module]) -> None:
    damages = additive_truth(tight, 0)

    def shares(levels: tuple[float, ...]) -> list[float]:
        limited = tight.with_levels(levels)
        study = optuna.create_study(direction="maximize", sampler=KnapsackSampler(limited, seed=0))
        for _ in range(12):
            trial = study.ask()
            genotype = limited.suggest_genotype(trial)
            limited.admit(trial, genotype)
            study.tell(trial, score_of(limited, damages, genotype))
        used = [trial.constraints for trial in study.get_trials()]
        return [1 + max(constraints.values()) for constraints in used]

    def count(levels: tuple[float, ...]) -> int:
        """How many proposals use up the whole budget, or one of its levels."""
        return sum(any(0.8 * level < share <= level for level in levels) for share in shares(levels))

    assert count((1.0,)) >= 10  # a few are random changes of the best
    assert count((0.5, 1.0)) >= 10
    assert max(shares((0.5, 1.0))) <= 1


def test_it_learns_from_trials_that_were_stopped_at_a_rung(tight: Space[nn.Module]) -> None:
    starts = tight.starts(8)

    def proposal(seed: int, stopped: bool) -> dict[str, object]:
        study = optuna.create_study(
            directions=["maximize", "minimize", "minimize"], sampler=KnapsackSampler(tight, seed=seed)
        )
        for index, genotype in enumerate(starts):
            study.enqueue_trial(tight.point(genotype))
            trial, cost = study.ask(), tight.cost(genotype)
            tight.suggest_genotype(trial)
            score = 0.9 - 0.1 * (index % 3)
            trial.set_user_attr("rung/1", score - 0.1)
            if stopped and index > 3:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            elif index <= 3:
                study.tell(trial, (score, cost.params, cost.macs))
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return study.ask(dict(tight.distributions)).params

    seeds = range(3)  # one may vary the front at random, for which nothing is learnt
    assert [proposal(seed, stopped=True) for seed in seeds] != [proposal(seed, stopped=False) for seed in seeds]


def test_it_finds_better_students_than_those_it_starts_from(tight: Space[nn.Module]) -> None:
    gains = []
    for seed in range(3):
        damages = additive_truth(tight, seed)
        ours = search(tight, KnapsackSampler(tight, seed=seed), damages, 24)
        best = [max(score_of(tight, damages, g) for g in genotypes) for genotypes in (ours[:8], ours)]
        gains.append(best[1] - best[0])
    assert np.mean(gains) > 0.01  # the starts alone are what a random sampler would be left with


def test_the_same_seed_proposes_the_same_and_a_resumed_study_goes_on_alike(tight: Space[nn.Module]) -> None:
    damages = additive_truth(tight, 1)
    whole = search(tight, KnapsackSampler(tight, seed=3), damages, 14)
    assert whole == search(tight, KnapsackSampler(tight, seed=3), damages, 14)

    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=KnapsackSampler(tight, seed=3))
    tight.enqueue(study)
    again = []
    for number in range(14):
        if number == 10:  # another process takes over
            study.sampler = KnapsackSampler(tight, seed=3)
        trial = study.ask()
        again.append(tight.suggest_genotype(trial))
        cost = tight.cost(again[-1])
        study.tell(trial, (score_of(tight, damages, again[-1]), cost.params, cost.macs))
    assert again == whole


def test_it_serves_a_single_objective_study_beside_parameters_of_the_users_own(tight: Space[nn.Module]) -> None:
    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("my learning rate", 0.01, 0.1)
        student = tight.suggest(trial)
        assert isinstance(student, nn.Module)
        return rate

    study = optuna.create_study(direction="maximize", sampler=KnapsackSampler(tight, seed=0))
    study.optimize(objective, n_trials=3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3


def test_without_a_budget_anything_up_to_the_base_may_come() -> None:
    space = Space(timm.create_model("resnet10t", num_classes=10), img_size=32)
    study = optuna.create_study(direction="maximize", sampler=KnapsackSampler(space, seed=0))
    trial = study.ask()
    base = space.table.base()
    cost = space.cost(space.suggest_genotype(trial))
    assert cost.params <= base.params
    assert cost.macs <= base.macs


@pytest.mark.parametrize("name", ["knapsack", "tpe", "nsgaii", "nsgaiii", "random"])
def test_every_name_of_the_command_line_makes_a_sampler(tight: Space[nn.Module], name: str) -> None:
    assert isinstance(make_sampler(name, tight, 0), optuna.samplers.BaseSampler)


def test_the_model_learns_an_additive_truth(tight: Space[nn.Module]) -> None:
    damages = additive_truth(tight, 5)
    generator = np.random.default_rng(0)
    rows = np.stack([generator.integers(len(block.choices), size=300) for block in tight.blocks], axis=1)
    scores = -0.25 * np.sum([d[column] for d, column in zip(damages, rows.T, strict=True)], axis=0)
    model = fit_scores(features_of(tight.table, prior_damages(tight.table)), rows[:250], scores[:250])
    draws = [model.draw(np.random.default_rng(seed)).scores(rows[250:]) for seed in range(20)]
    predicted = np.mean(draws, axis=0)
    expected = -np.sum([d[column] for d, column in zip(prior_damages(tight.table), rows[250:].T, strict=True)], axis=0)
    learnt, believed = (np.corrcoef(guess, scores[250:])[0, 1] for guess in (predicted, expected))
    assert learnt > believed + 0.05
    assert abs((predicted - scores[250:]).mean()) < 0.01  # the constant, too


def test_before_any_trial_a_draw_spreads_around_the_prior(tight: Space[nn.Module]) -> None:
    priors = prior_damages(tight.table)
    model = fit_scores(features_of(tight.table, priors), np.zeros((0, len(priors)), dtype=np.int64), np.zeros(0))
    draws = np.array([model.draw(np.random.default_rng(seed)).worth[0] for seed in range(200)])
    assert np.allclose(draws.mean(axis=0), -0.05 * priors[0], atol=5 * draws.std(axis=0).max() / 200**0.5)
    assert draws.std(axis=0).min() > 0
