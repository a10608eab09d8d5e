"""Blocks that may be dropped and residual streams that may be narrowed, where the user opens them."""

from __future__ import annotations

import json

import numpy as np
import optuna
import pytest
import timm
import torch
from torch import nn

from nas_kd.costs.verification import measure
from nas_kd.errors import GenotypeError
from nas_kd.search.options import Options, parse_options
from nas_kd.search.sampler import KnapsackSampler
from nas_kd.search.space import Space
from nas_kd.search.starts import uniform_ladder
from nas_kd.space import main as space_main


def _space(space: str, *pins: str, search_stages: bool = False, budget: str | None = None) -> Space[nn.Module]:
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10).eval()
    options = parse_options(space, pins, search_stages=search_stages)
    return Space(network, img_size=32, options=options, budget=budget, name="resnet18")


@pytest.fixture(scope="module")
def everything() -> Space[nn.Module]:
    return _space("width,kernel,conv,keep", search_stages=True)


def _draw(space: Space[nn.Module], seed: int) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    return {name: d.choices[rng.integers(len(d.choices))] for name, d in space.distributions.items()}


def test_neither_is_open_by_default() -> None:
    space = _space("width,kernel,conv")
    assert not any(block.is_stream for block in space.blocks)
    assert all(choice.keep for block in space.blocks for choice in block.choices)
    assert Options().aspects == {"width", "kernel", "conv"}


def test_parameters_say_what_is_open(everything: Space[nn.Module]) -> None:
    names = set(everything.distributions)
    assert {"layer1.0.keep", "layer1.1.keep", "layer2.1.keep", "layer1.stream.width"} <= names
    assert "layer2.0.keep" not in names  # its shortcut is a convolution
    assert everything.distributions["layer1.0.keep"].choices == (True, False)


def test_points_and_genotypes_agree(everything: Space[nn.Module]) -> None:
    for seed in range(20):
        point = _draw(everything, seed)
        genotype = everything.genotype(point)
        assert {name: point[f"{name}.keep"] for name, c in genotype.items() if f"{name}.keep" in point} == {
            name: c.keep for name, c in genotype.items() if f"{name}.keep" in point
        }
        assert everything.genotype(everything.point(genotype)) == genotype
        assert everything.point(genotype).keys() == everything.distributions.keys()


def test_a_dropped_block_is_one_choice_whatever_else_is_suggested(everything: Space[nn.Module]) -> None:
    point = {**_draw(everything, 0), "layer1.0.keep": False}
    digests = set()
    for width in everything.distributions["layer1.0.width"].choices:
        digests.add(everything.genotype({**point, "layer1.0.width": width}).digest)
    assert len(digests) == 1


def test_students_run_and_cost_what_is_said(everything: Space[nn.Module]) -> None:
    for seed in range(3):
        genotype = everything.genotype(_draw(everything, seed))
        student = everything.student(genotype)
        assert student(torch.randn(1, 3, 32, 32)).shape == (1, 10)
        assert measure(student, (3, 32, 32)) == everything.cost(genotype)


def test_smaller_budgets_are_reached(everything: Space[nn.Module]) -> None:
    least = min(cost.macs for cost in uniform_ladder(_space("width,kernel,conv").table).values())
    rungs = uniform_ladder(everything.table)
    assert min(cost.macs for cost in rungs.values()) < least / 2
    assert any(not choice.keep for genotype in rungs for choice in genotype.values())
    small = everything.with_budget(f"macs={least // 2}")
    starts = small.starts(4)
    assert starts
    assert all(small.cost(start).macs <= least // 2 for start in starts)


def test_the_sampler_proposes_them() -> None:
    space = _space("width,keep", search_stages=True, budget="params=30%")
    study = optuna.create_study(direction="maximize", sampler=KnapsackSampler(space, seed=0))
    streams = set()
    for number in range(12):
        trial = study.ask(space.distributions)
        genotype = space.genotype(trial.params)
        assert space.budget is not None
        assert space.budget.admits(space.cost(genotype))
        streams |= {genotype["layer4.stream"].width}
        study.tell(trial, 0.1 + 0.01 * number)
    assert len(streams) > 1


def test_pins_reach_them() -> None:
    space = _space(
        "width,conv", "layer1.1:keep=no", "layer1.stream:width=0.5/1", "layer1.0:width=0.5", search_stages=True
    )
    assert [choice.keep for choice in space.analysis.block("layer1.1").choices] == [False]
    assert space.analysis.block("layer1.stream").widths == (1.0, 0.5)
    assert not any(name.startswith("layer1.1.") for name in space.distributions)
    dropping = _space("width,keep", "layer1.0:width=0.5")
    assert dropping.distributions["layer1.0.keep"].choices == (True, False)
    assert "layer1.0.width" not in dropping.distributions
    gone = dropping.genotype({**_draw(dropping, 0), "layer1.0.keep": False})
    assert dropping.genotype(dropping.point(gone)) == gone


def test_streams_open_without_other_widths() -> None:
    space = _space("conv", search_stages=True)
    assert {name for name in space.distributions if name.endswith(".width")} == {
        f"layer{stage}.stream.width" for stage in (1, 2, 3, 4)
    }


def test_keep_is_yes_or_no() -> None:
    with pytest.raises(GenotypeError, match="cannot read keep=maybe: write yes or no"):
        parse_options("keep=maybe")


def test_the_command_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["resnet18", "--img-size", "32", "--space", "width,keep", "--search-stages", "--json"]
    assert space_main(given) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "layer1.stream" in [block["name"] for block in facts["blocks"]]
    assert facts["min_macs"] < 0.1 * facts["macs"]
