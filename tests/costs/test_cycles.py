"""Cycles of an accelerator: as its compiler estimates them, and as the search expects them. What needs the compiler is
marked mcu, `pytest -m mcu`."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.stats import kendalltau
from torch import nn

from nas_kd import space as space_command
from nas_kd.arguments.study import parse_study
from nas_kd.budget import ACCELERATOR, CYCLES, Cost, parse_budget
from nas_kd.costs.cycle_table import STUDENTS, CycleTable
from nas_kd.costs.draft import drafted
from nas_kd.errors import BudgetError, ModelError, NasKdError
from nas_kd.networks.micro import Estimator, compile_file
from nas_kd.preparation.job import choices_made
from nas_kd.preparation.opening import bound_space, open_space
from nas_kd.search.options import parse_options
from nas_kd.search.space import Space
from nas_kd.students.inheritance import inherit_student

SIZE = (3, 32, 32)
STUDY = "--model test_resnet --img-size 32 --space width --no-search-stages --no-base-bounds --budget cycles=50%"


def created() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("test_resnet", num_classes=10)
    return network


def opened() -> Space[nn.Module]:
    options = parse_options("width=0.25/0.5/1,kernel,conv=standard/depthwise")
    return Space(created(), img_size=32, options=options, name="test_resnet")


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find, hidden = importlib.util.find_spec, ("tflite_micro", "ethosu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))


def test_bounds_are_read_as_counts() -> None:
    budget = parse_budget("cycles=400K,macs=1M", Cost(params=1, macs=1, cycles=1000))
    assert budget[CYCLES] == 400_000
    assert parse_budget("cycles=50%", Cost(params=1, macs=1, cycles=1000))[CYCLES] == 500
    assert not budget.admits(Cost(params=1, macs=1))
    assert budget.admits(Cost(params=1, macs=1, cycles=400_000))
    with pytest.raises(BudgetError, match=r"write it like cycles=1M"):
        parse_budget("cycles=4KiB")


@pytest.mark.usefixtures("nothing_installed")
def test_without_the_extra_cycles_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = parse_study([*STUDY.split(), "--out", str(tmp_path)])
    with pytest.raises(NasKdError, match=r"need tflite-micro and ethos-u-vela: pip install 'nas-kd\[mcu\]'"):
        bound_space(open_space(settings, created()), settings)
    assert space_command.main(["test_resnet", "--img-size", "32", "--budget", "cycles=50%"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'nas-kd[mcu]'\n")


@pytest.mark.usefixtures("nothing_installed")
def test_a_worker_without_the_compiler_goes_by_what_the_study_notes() -> None:
    settings = parse_study(STUDY.split())
    space = open_space(settings, created())
    width = [7 * np.arange(len(block.choices), 0, -1) for block in space.blocks]
    notes = {"base": 2000, "sums": {"": 100, **{str(n): own.tolist() for n, own in enumerate(width)}}}
    space = bound_space(space, settings, begun={"nas_kd cycles": notes})
    assert space.base_cost().cycles == 2000
    assert space.budget is not None
    assert space.budget[CYCLES] == 1000
    assert choices_made(settings, space.budget)[CYCLES] == ACCELERATOR
    narrowest = space.table.cheapest(CYCLES)
    assert space.confirmed_cost(narrowest).cycles == 100 + 7 * len(space.blocks)
    assert space.starts(2)


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return Estimator(ACCELERATOR)


@pytest.fixture(scope="module")
def space(estimator: Estimator) -> Space[nn.Module]:
    own = opened()
    return own.with_costs(own.costs.with_cycles(estimator))


@pytest.mark.mcu
def test_operators_add_up_to_what_the_compilers_command_tells(estimator: Estimator, tmp_path: Path) -> None:
    content = drafted(created(), SIZE).content
    (tmp_path / "draft.tflite").write_bytes(content)
    assert sum(estimator.cycles(content)) == compile_file(tmp_path / "draft.tflite", ACCELERATOR).cycles


@pytest.mark.mcu
def test_the_table_expects_what_other_students_take(space: Space[nn.Module]) -> None:
    assert space.costs.cycles is not None
    rng = np.random.default_rng(7)
    rows = [[int(rng.integers(len(block.choices))) for block in space.blocks] for _ in range(12)]
    expected = [space.table.cost(space.table.genotype(row)).cycles for row in rows]
    truth = [sum(space.costs.cycles.estimator.cycles(drafted(student(space, row), SIZE).content)) for row in rows]  # type: ignore[union-attr]
    assert np.abs(np.array(expected) / np.array(truth) - 1).mean() < 0.02
    assert kendalltau(expected, truth)[0] > 0.9


def student(space: Space[nn.Module], row: list[int]) -> nn.Module:
    return inherit_student(space.base, space.analysis, space.table.genotype(row)).eval()


@pytest.mark.mcu
def test_starts_keep_to_the_bound_as_estimated(space: Space[nn.Module]) -> None:
    half = space.with_budget("cycles=50%")
    assert half.costs.cycles is not None
    assert half.budget is not None
    starts = half.starts(4)
    assert starts
    assert max(half.costs.cycles.whole(genotype) for genotype in starts) <= half.budget[CYCLES]
    with pytest.raises(BudgetError, match=r"within cycles=1K: the smallest reachable is cycles=\d"):
        space.with_budget("cycles=1K")


@pytest.mark.mcu
def test_students_are_estimated_once(space: Space[nn.Module], estimator: Estimator) -> None:
    class Refusing(dict[str, dict[str, Any]]):
        def __setitem__(self, key: str, record: dict[str, Any]) -> None:
            raise AssertionError(key)

    kept: dict[str, dict[str, Any]] = {}
    first = CycleTable(space.base, space.analysis, SIZE, estimator, kept)
    first.estimate_students()
    assert 0 < len(kept) <= STUDENTS
    again = CycleTable(space.base, space.analysis, SIZE, estimator, Refusing(kept))
    again.estimate_students()
    told = CycleTable(space.base, space.analysis, SIZE, None)
    told.tell(first.notes())
    genotype = space.table.cheapest("params")
    one, two, three = (own.onto(space.table).cost(genotype).cycles for own in (first, again, told))
    assert one == two == pytest.approx(three, rel=1e-3)


@pytest.mark.mcu
def test_operators_that_devices_do_not_get_are_named(estimator: Estimator) -> None:
    torch.manual_seed(0)
    base = timm.create_model("convnext_atto", num_classes=10)
    with pytest.raises(ModelError, match=r"the network runs \w+, which the way to int8 files for devices lacks"):
        Space(base, img_size=32, name="convnext_atto").costs.with_cycles(estimator)


@pytest.mark.mcu
def test_the_space_command_tells_what_is_reachable(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["test_resnet", "--img-size", "32", "--num-classes", "10", "--space", "width=0.5/1", "--budget"]
    assert space_command.main([*arguments, "cycles=90%"]) == 0
    words = capsys.readouterr().out
    assert f"cycles of {ACCELERATOR}; smallest reachable: about" in words
    assert "can be met" in words


@pytest.mark.mcu
def test_a_study_resumes_with_what_it_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = parse_study([*STUDY.split(), "--out", str(tmp_path)])
    first = open_space(settings, created())
    with caplog.at_level(logging.WARNING):
        first = bound_space(first, settings)
    assert first.costs.cycles is not None
    second = open_space(settings, created())
    second = bound_space(second, settings, begun={"nas_kd cycles": first.costs.cycles.notes()})
    assert first.budget == second.budget
    assert list((tmp_path / "cache").glob("cycles-*.jsonl"))
    assert not caplog.messages
