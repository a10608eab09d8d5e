"""Structure learning on real digits: the loss by hand, what λ does, and how it lands on a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas_kd.analysis.structure import Analysis
from nas_kd.budget import Budget
from nas_kd.costs.verification import analyse
from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages
from nas_kd.data.splits import Splits
from nas_kd.errors import BudgetError, GenotypeError
from nas_kd.learnt_widths.channel_cost import channel_cost, kept_counts, segments_of
from nas_kd.learnt_widths.learning import Goal, LearntWidths, WidthLearner, learn_widths, structure_loss
from nas_kd.search.options import parse_options, restrict
from nas_kd.training.loop import Run, train
from nas_kd.training.losses import soft_loss
from nas_kd.training.recipe import Recipe

MakeNetwork = Callable[..., nn.Module]
RECIPE = Recipe(epochs=6, batch_size=16, lr=0.02, warmup=0.1)


@pytest.fixture
def data(digits: Splits) -> AugmentedImages:
    return AugmentedImages(digits.train, Augmentation(flip=False))


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(timm.create_model("test_resnet", in_chans=1, num_classes=10), (1, 32, 32), open={"width"})


@pytest.fixture
def learn(make_network: MakeNetwork, analysis: Analysis, data: AugmentedImages) -> Callable[..., LearntWidths]:
    """Learns the widths of a fresh network."""

    def run(goal: Goal, recipe: Recipe = RECIPE, **more: object) -> LearntWidths:
        return learn_widths(WidthLearner(make_network(), analysis, goal), data, recipe, **more)  # type: ignore[arg-type]

    return run


def macs(bound: float) -> Budget:
    return Budget((("macs", bound),))


def two_convolutions() -> nn.Sequential:
    """3→8→16 channels at 8×8, two 3×3 convolutions with batch norms, ten classes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def in_use(scales: Tensor) -> float:
    scales = scales.detach()
    return float(scales.abs().sum() ** 2 / scales.square().sum())


def test_the_loss_by_hand() -> None:
    """(1 − α)·CE + α·T²·KL + Σ_b λ_b·G_b, G_b the MACs of b's channels over those of the base."""
    torch.manual_seed(1)
    network = two_convolutions()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([1.0, -1, 0.5, 0, 0, 2, 0, 0.1]))
        network[4].weight.copy_(torch.linspace(0.1, 1, 16))
    goal = Goal(budget=macs(20_000), factors={"0": 2.0, "3": 0.5}, strength=3.0)
    learner = WidthLearner(network, analyse(network, (3, 8, 8), open={"width"}), goal)
    learner.scales.weights = torch.ones_like(learner.scales.weights)  # strengths are |γ|
    student, teacher, labels = torch.randn(4, 10), torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    loss = structure_loss(
        student, labels, teacher, learner=learner, distill_weight=0.9, soft=soft_loss("kd", temperature=4)
    )
    target = F.softmax(teacher / 4, 1)
    kl = (target * (target.log() - F.log_softmax(student / 4, 1))).sum(1).mean()
    first, second = in_use(network[1].weight), in_use(network[4].weight)
    pixels = 64 * 9
    costs = pixels * 3 * first + pixels * first * second, pixels * first * second + 10 * second
    base = pixels * 3 * 8 + pixels * 8 * 16 + 160
    expected = 0.1 * F.cross_entropy(student, labels) + 0.9 * 16 * kl + 3.0 * (2 * costs[0] + 0.5 * costs[1]) / base
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert learner.shares()["macs"] == pytest.approx((costs[0] + 10 * second) / base)


def test_channels_of_equal_strength_count_one_each_and_the_common_scale_does_not_matter() -> None:
    network = two_convolutions()
    learner = WidthLearner(network, analyse(network, (3, 8, 8), open={"width"}), Goal(budget=macs(1), factors={}))
    learner.scales.weights = torch.ones_like(learner.scales.weights)
    assert learner.counts().tolist() == pytest.approx([8, 16])
    assert learner.shares()["macs"] == pytest.approx(1)
    with torch.no_grad():
        learner.network.get_submodule("4").weight.copy_(torch.tensor([0.3] * 6 + [0.0] * 10))
        learner.network.get_submodule("1").weight.mul_(0.01)
    assert learner.counts().tolist() == pytest.approx([8, 6])


def test_the_cost_moves_scale_factors_alone() -> None:
    network = two_convolutions()
    with torch.no_grad():
        network[1].weight.uniform_(0.1, 1)
        network[4].weight.uniform_(0.1, 1)
    learner = WidthLearner(network, analyse(network, (3, 8, 8), open={"width"}), Goal(budget=macs(1), factors={}))
    learner.step().backward()
    moved = {name for name, p in learner.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"1.weight", "4.weight"}


def test_lambda_0_is_plain_distillation_and_keeps_everything(
    learn: Callable[..., LearntWidths], make_network: MakeNetwork, data: AugmentedImages, analysis: Analysis
) -> None:
    learnt = learn(Goal(budget=macs(1), factors={}, strength=0.0), replace(RECIPE, epochs=1))
    plain = make_network()
    train(plain, data, replace(RECIPE, epochs=1))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(learnt.network.state_dict()[name], tensor), name
    for damages in learnt.damages(analysis, {}):
        assert damages[0] == 0
        assert (damages[1:] > 0).all()


def test_it_lands_on_the_budget_and_a_larger_lambda_narrows_its_block(
    learn: Callable[..., LearntWidths], analysis: Analysis
) -> None:
    mine = [n for n, segment in enumerate(segments_of(analysis)) if analysis.blocks[segment.block].name == "layer3.0"]
    base = channel_cost(analysis, timm.create_model("test_resnet", in_chans=1, num_classes=10))
    bound = 0.6 * base.total(kept_counts(analysis, analysis.identity))[1].item()
    budget = Budget((("params", 1e9), ("macs", bound)))
    plain, weighted = (learn(Goal(budget=budget, factors={"layer3.0": factor})) for factor in (1.0, 10.0))
    for learnt in (plain, weighted):
        assert learnt.shares["macs"] == pytest.approx(0.6, abs=0.04)
        assert learnt.lambdas["params"] < 0.01 < learnt.lambdas["macs"]  # a bound that does not bind lets go
    assert (weighted.counts[mine] < plain.counts[mine] - 1).all()


def test_a_factor_weighs_the_damage_of_rounding(learn: Callable[..., LearntWidths], analysis: Analysis) -> None:
    """Twice the λ halves what it hurts to narrow the block; what is not damaged stays so."""
    learnt = learn(Goal(budget=macs(1), factors={}, strength=0.0), replace(RECIPE, epochs=1))
    plain, weighted = learnt.damages(analysis, {}), learnt.damages(analysis, {"layer3.0": 2.0})
    for block, one, two in zip(analysis.blocks, plain, weighted, strict=True):
        assert two.tolist() == pytest.approx((one / (2 if block.name == "layer3.0" else 1)).tolist())


def test_a_killed_learning_goes_on_to_the_same_widths(
    make_network: MakeNetwork, analysis: Analysis, data: AugmentedImages, digits: Splits, tmp_path: Path
) -> None:
    recipe, run = replace(RECIPE, epochs=3, eval_epochs=(1, 2)), Run(checkpoint=tmp_path / "state")

    def kill(epoch: int, accuracy: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    def learn(**more: Any) -> LearntWidths:
        learner = WidthLearner(make_network(), analysis, Goal(budget=macs(2.4e6), factors={}))
        return learn_widths(learner, data, recipe, val=digits.val[:20], **more)

    expected, heard = learn(), []
    with pytest.raises(KeyboardInterrupt):
        learn(report=kill, run=run)
    resumed = learn(report=lambda epoch, _: heard.append(epoch), run=run)
    assert heard == [3]
    assert resumed.lambdas == expected.lambdas
    assert resumed.counts.tolist() == expected.counts.tolist()


def test_pinned_and_bounded_blocks_are_left_their_channels(make_network: MakeNetwork) -> None:
    network = make_network()
    pins = ("layer3.0:width=1", "layer4.0:width=0.5/1")
    limited = restrict(analyse(network, (1, 32, 32), open={"width"}), parse_options("width", pins))
    learner = WidthLearner(network, limited, Goal(budget=macs(1), factors={}))
    with torch.no_grad():
        for name, parameter in learner.network.named_parameters():
            if name.startswith(("layer3.0", "layer4.0")) and parameter.ndim == 1:
                parameter[1:] = 0
    names = [limited.blocks[segment.block].name for segment in segments_of(limited)]
    for name, segment, count in zip(names, segments_of(limited), learner.counts().tolist(), strict=True):
        if name in ("layer3.0", "layer4.0"):
            assert count == {"layer3.0": 1, "layer4.0": 0.5}[name] * len(segment.units)


@pytest.mark.parametrize(
    ("budget", "factors", "error", "words"),
    [
        ((("latency", 1e6),), {}, BudgetError, "bounds params or macs, not latency"),
        ((("macs", 1.0), ("size", 1.0)), {}, BudgetError, "not size"),
        ((("macs", 1.0),), {"a": -1.0}, GenotypeError, "for a must be 0 or more, got -1.0"),
        ((("macs", 1.0),), {"a": math.inf}, GenotypeError, "must be 0 or more, got inf"),
    ],
)
def test_what_cannot_be_learnt_for_is_refused(
    budget: tuple[tuple[str, float], ...], factors: dict[str, float], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Goal(budget=Budget(budget), factors=factors)


def test_a_factor_of_no_block_is_refused(make_network: MakeNetwork, analysis: Analysis) -> None:
    with pytest.raises(GenotypeError, match=r"has no block 'layer3'; did you mean 'layer3\.0'"):
        WidthLearner(make_network(), analysis, Goal(budget=macs(1), factors={"layer3": 1.0}))
