from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import timm
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nas_kd.budget import Budget, Cost, parse_budget
from nas_kd.errors import BudgetError, GenotypeError, ModelError
from nas_kd.genotype import Genotype
from nas_kd.networks.convolutions import Shift2d
from nas_kd.networks.hub import input_size_of
from nas_kd.search.space import Space

Within = Callable[[Space[nn.Module], str | Budget], Space[nn.Module]]
Draw = Callable[[Space[nn.Module], int], Genotype]
seeds = st.integers(0, 2**31)
# its equations have no blocks that cost little, and take the solver seconds each
WITHOUT_VGG = ["resnet18", "mobilenetv2_100", pytest.param("vgg11_bn", marks=pytest.mark.slow)]


def measured(network: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """What torch itself counts in a network, but for the one-hot kernels of shifts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, *input_size))
    flops, name = counter.get_flop_counts(), type(network).__name__
    shifts = [f"{name}.{path}" for path, module in network.named_modules() if isinstance(module, Shift2d)]
    macs = (counter.get_total_flops() - sum(sum(flops[path].values()) for path in shifts)) // 2
    return Cost(params=sum(p.numel() for p in network.parameters()), macs=macs)


def proposal(space: Space[nn.Module], genotype: Genotype) -> optuna.Trial:
    """A running trial of this genotype in a study of one objective."""
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(space.point(genotype))
    return study.ask()


class TestParameters:
    def test_they_are_one_flat_constant_set_of_plain_values(self, space: Space[nn.Module]) -> None:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(5):
            trial = study.ask()
            space.suggest_genotype(trial)
            assert trial.distributions == space.distributions
        assert all(isinstance(value, (float, int, str)) for d in space.distributions.values() for value in d.choices)
        assert all(len(d.choices) > 1 for d in space.distributions.values())

    @settings(max_examples=25, deadline=None)
    @given(seed=seeds)
    def test_point_and_genotype_are_inverse(self, space: Space[nn.Module], draw: Draw, seed: int) -> None:
        genotype = draw(space, seed)
        point = space.point(genotype)
        assert point.keys() == space.distributions.keys()
        assert space.genotype(point) == genotype
        assert space.point(space.genotype(point)) == point

    def test_a_trial_gives_the_genotype_of_its_parameters(self, space: Space[nn.Module], draw: Draw) -> None:
        genotype = draw(space, 3)
        assert space.suggest_genotype(proposal(space, genotype)) == genotype

    def test_parameters_of_another_space_are_refused(self, space: Space[nn.Module]) -> None:
        with pytest.raises(GenotypeError, match=r"has no parameter 'nowhere.width': is it of another space"):
            space.genotype({"nowhere.width": 0.5})

    def test_a_value_that_is_not_offered_is_refused(self, resnet: Space[nn.Module]) -> None:
        with pytest.raises(GenotypeError, match=r"not open to block 'layer1.0': it offers width"):
            resnet.genotype({"layer1.0.width": 0.123})

    def test_a_genotype_of_another_base_is_refused(self, resnet: Space[nn.Module], small: Space[nn.Module]) -> None:
        with pytest.raises(GenotypeError):
            resnet.cost(small.analysis.identity)


class Idle(TorchDispatchMode):
    """In which torch has nothing to do: no network is built."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


class TestStudents:
    @settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(seed=seeds)
    def test_they_cost_what_the_closed_form_says(self, space: Space[nn.Module], draw: Draw, seed: int) -> None:
        genotype = draw(space, seed)
        student = space.student(genotype)
        assert measured(student, space.input_size) == space.cost(genotype)
        assert type(student) is type(space.base)

    def test_the_identity_is_the_base(self, space: Space[nn.Module]) -> None:
        student = space.student(space.analysis.identity)
        images = torch.randn(2, *space.input_size)
        base = space.base.eval()
        assert list(student.state_dict()) == list(base.state_dict())
        assert torch.equal(student.eval()(images), base(images))
        assert space.cost(space.analysis.identity) == space.table.base() == measured(base, space.input_size)

    def test_building_one_leaves_the_base_as_it_was(self, resnet: Space[nn.Module], draw: Draw) -> None:
        before = copy.deepcopy(resnet.base.state_dict())
        student = resnet.student(draw(resnet, 1))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.zero_()
        after = resnet.base.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_they_come_from_genotypes_and_from_finished_trials(self, resnet: Space[nn.Module], draw: Draw) -> None:
        genotype = draw(resnet, 5)
        trial = proposal(resnet, genotype)
        suggested = resnet.suggest(trial)
        trial.study.tell(trial, 0.5)
        again = resnet.student(trial.study.best_trial)
        assert [p.shape for p in again.parameters()] == [p.shape for p in suggested.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), suggested.parameters(), strict=True))


class TestBudget:
    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(seed=seeds, params=st.floats(0.02, 1.2), macs=st.floats(0.02, 1.2))
    def test_nothing_over_it_is_ever_built(
        self, space: Space[nn.Module], within: Within, draw: Draw, seed: int, params: float, macs: float
    ) -> None:
        base = space.table.base()
        budget = Budget((("params", params * base.params), ("macs", macs * base.macs)))
        try:
            limited, genotype = within(space, budget), draw(space, seed)
        except BudgetError:
            assume(False)
        trial = optuna.trial.FixedTrial(space.point(genotype))
        if budget.admits(space.cost(genotype)):
            limited.admit(trial, genotype)
            return
        with Idle(), pytest.raises(optuna.TrialPruned, match="over budget: "):
            limited.suggest(trial)
        with Idle(), pytest.raises(BudgetError, match="over budget: "):
            limited.student(genotype)

    @pytest.mark.parametrize("space", WITHOUT_VGG, indirect=True)
    @settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(seed=seeds, share=st.floats(0.1, 0.9))
    def test_what_is_built_is_within_it(self, space: Space[nn.Module], within: Within, seed: int, share: float) -> None:
        limited = within(space, f"params={100 * share:.2f}%,macs=90%")
        assert limited.budget is not None
        starts = limited.starts(6)
        cost = measured(limited.student(starts[seed % len(starts)]), space.input_size)
        assert limited.budget.admits(cost)

    def test_the_bound_itself_is_within_and_one_less_is_over(
        self, resnet: Space[nn.Module], within: Within, draw: Draw
    ) -> None:
        genotype = draw(resnet, 2)
        params = resnet.cost(genotype).params
        assert within(resnet, Budget((("params", params),))).student(genotype) is not None
        with pytest.raises(BudgetError):
            within(resnet, Budget((("params", params - 1),))).student(genotype)

    @pytest.mark.parametrize("space", WITHOUT_VGG, indirect=True)
    def test_an_over_budget_trial_is_pruned_with_its_constraints_and_a_reason(
        self, space: Space[nn.Module], within: Within
    ) -> None:
        limited = within(space, "params=50%,macs=100%")
        study = optuna.create_study(directions=["maximize", "minimize"])
        study.enqueue_trial(space.point(space.analysis.identity))
        study.enqueue_trial(space.point(limited.starts(1)[0]))

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            student = limited.suggest(trial)
            return 0.5, sum(p.numel() for p in student.parameters())

        study.optimize(objective, n_trials=2)
        over, fine = study.get_trials()
        assert over.state == TrialState.PRUNED
        assert over.constraints == {"params": pytest.approx(1.0), "macs": pytest.approx(0.0)}
        assert "over budget: params" in over.user_attrs["reason"]
        assert "100% over" in over.user_attrs["reason"]
        assert over.user_attrs["params"] == space.table.base().params
        assert fine.state == TrialState.COMPLETE
        assert fine.constraints.keys() == over.constraints.keys()
        assert all(excess <= 0 for excess in fine.constraints.values())
        assert study.best_trials == [fine]

    def test_refusing_takes_a_moment(self, space: Space[nn.Module], within: Within) -> None:
        """It is arithmetic on tables: torch has nothing to do."""
        limited = within(space, "params=50%")
        point = space.point(space.analysis.identity)
        with Idle(), pytest.raises(optuna.TrialPruned):
            limited.suggest(optuna.trial.FixedTrial(point))
        with Idle(), pytest.raises(AssertionError, match="was called"):
            torch.zeros(1)

    def test_an_impossible_one_names_the_smallest_reachable_cost(self, space: Space[nn.Module]) -> None:
        least = space.table.cost(space.table.cheapest("params")).params
        words = rf"no student of .* is within params=1K: the smallest reachable is params={least / 1e3:.4g}K; raise"
        with pytest.raises(BudgetError, match=words):
            space.with_budget(parse_budget("params=1K"))
        space.with_budget(Budget((("params", least),)))
        with pytest.raises(BudgetError, match="smallest reachable is"):
            space.with_budget(Budget((("params", least - 1),)))

    def test_an_impossible_one_is_refused_when_the_space_is_made(self) -> None:
        network = timm.create_model("test_resnet", num_classes=10)
        with pytest.raises(BudgetError, match=r"smallest reachable is params=\d.*macs="):
            Space(network, budget="params=1,macs=1%", img_size=32)


class TestValue:
    def test_what_is_different_is_another_space(self, resnet: Space[nn.Module]) -> None:
        half = resnet.with_budget("params=50%")
        assert resnet.budget is None
        assert half.budget == Budget((("params", 0.5 * resnet.base_cost().params),))
        assert half.with_budget(None).budget is None
        assert half.widened(1.5).budget == Budget((("params", 0.75 * resnet.base_cost().params),))
        assert half.base is resnet.base
        assert half.costs is resnet.costs  # nothing that was measured is measured again
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'budget'"):
            half.budget = None  # type: ignore[misc]

    def test_a_study_begins_with_what_is_given(self, resnet: Space[nn.Module], draw: Draw) -> None:
        half = resnet.with_budget("params=50%")
        own = half.starts(3)[1]
        study = optuna.create_study(direction="maximize")
        half.with_given([resnet.analysis.identity, own]).enqueue(study, 2)
        first = study.get_trials()[0].system_attrs["fixed_params"]
        assert half.genotype(first) == own  # the base is over the budget


class TestEnqueue:
    @pytest.mark.parametrize("directions", [["maximize"], ["maximize", "minimize", "minimize"]])
    def test_a_study_of_any_objectives_begins_with_the_starts(
        self, resnet: Space[nn.Module], within: Within, directions: list[Any]
    ) -> None:
        limited = within(resnet, "params=1M")
        study = optuna.create_study(directions=directions)
        assert limited.enqueue(study, 4) == 4
        limited.enqueue(study, 4)
        assert len(study.get_trials(states=(TrialState.WAITING,))) == 4
        first = study.ask()
        assert limited.suggest_genotype(first) == limited.starts(4)[0]
        assert first.user_attrs["source"] == "warm start"
        limited.admit(first, limited.starts(4)[0])
        study.tell(first, [0.5] * len(directions))
        limited.enqueue(study, 4)
        assert len(study.get_trials(states=(TrialState.WAITING,))) == 3


class TestInput:
    def test_it_is_the_models_own_unless_given(self) -> None:
        network = timm.create_model("test_resnet", in_chans=1)
        assert input_size_of(network, None) == (1, 160, 160)
        assert input_size_of(network, 32) == (1, 32, 32)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_an_image_may_be_rearranged_before_it_is_convolved(self, channels: int) -> None:
        with torch.device("meta"):
            network = timm.create_model("tresnet_m", in_chans=channels)
        assert network.body.conv1.conv.in_channels == 16 * channels
        assert input_size_of(network, 64) == (channels, 64, 64)

    def test_a_base_that_was_changed_by_hand_is_refused_at_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with torch.device("meta"):
            network = timm.create_model("test_resnet")
        with caplog.at_level(logging.WARNING):
            Space(network, img_size=32)
        assert caplog.text == ""
        network.maxpool = nn.Identity()
        with pytest.raises(ModelError, match=r"was changed after timm created it \(maxpool is gone, not MaxPool2d\("):
            Space(network, img_size=32)

    def test_a_model_without_convolutions_is_refused(self) -> None:
        with pytest.raises(
            ModelError, match="has no spatial convolutions: only convolutional networks can be searched"
        ):
            Space(timm.create_model("test_vit"))
