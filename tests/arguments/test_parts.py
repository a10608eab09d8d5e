"""Settings in parts: what is read is written again, defaults are stated once, notes of earlier versions are read."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas_kd.arguments.augment import AugmentOptions
from nas_kd.arguments.data import DataSettings
from nas_kd.arguments.distill import DistillSettings, distill_parser, parse_distill
from nas_kd.arguments.parts import changed, defaults, read, written
from nas_kd.arguments.study import OPEN, Settings, noted_settings, parse_study, restore_settings, study_parser
from nas_kd.arguments.worker import worker_parser
from nas_kd.learnt_widths.arguments import parse_structure, structure_parser
from nas_kd.rank_check.arguments import RankSettings, parse_rank_check, rank_parser

PARSERS = (study_parser, distill_parser, structure_parser, rank_parser, worker_parser)
FULL = parse_study(
    "--budget params=1M,macs=50% --model mobilenetv2_100 --teacher resnet50 --teacher-checkpoint t.pth --data-dir d "
    "--scale 0.5 0.9 --aa rand-m9 --latency-threads 2 --pin layer1.*:width=1 --pin layer2.*:width=1 --proxy-lr 0.01 "
    "--refine-epochs 3 --distill online --start-from a.json --jobs 2 --no-baselines --int8 --seed 3".split()
)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4))


def test_settings_are_read_as_they_were_written() -> None:
    assert read(Settings, written(FULL)) == FULL
    assert restore_settings(json.loads(json.dumps(noted_settings(FULL)))) == FULL


@given(st.dictionaries(st.sampled_from(sorted(written(FULL))), VALUES))
def test_whatever_their_values_are(values: dict[str, Any]) -> None:
    settings = changed(FULL, **values)
    assert written(settings) == {**written(FULL), **values}
    assert changed(settings, **written(FULL)) == FULL


def test_every_argument_has_one_name_in_all_parts() -> None:
    leaves = [own.name for own in dataclasses.fields(Settings) if not dataclasses.is_dataclass(getattr(FULL, own.name))]
    parts = [getattr(FULL, own.name) for own in dataclasses.fields(Settings) if own.name not in leaves]
    assert len(parts) == 11
    assert len(written(FULL)) == len(leaves) + sum(len(dataclasses.fields(part)) for part in parts)


@pytest.mark.parametrize("parser", PARSERS)
def test_parsers_state_no_default_of_their_own(parser: Any) -> None:
    made = parser()
    stated = {**defaults(Settings), **defaults(DistillSettings), **defaults(RankSettings)}
    for action in made._actions:
        if isinstance(action, argparse._StoreAction) and action.default not in (None, argparse.SUPPRESS):
            assert action.dest in stated or action.dest == "wait", action.dest


def test_what_is_not_asked_for_is_as_the_class_says() -> None:
    settings = parse_study(["--budget=params=1M"])
    usual = {"dataset": "digits", "augment": AugmentOptions()}
    expected = {**defaults(Settings), **usual, "budget": "params=1M", "left_open": OPEN}
    assert {**written(settings), "command": ""} == expected
    distilled = parse_distill(["resnet18", "--no-teacher"])
    assert {**written(distilled), "command": ""} == {
        **defaults(DistillSettings), **usual, "model": "resnet18", "mode": "plain",
    }  # fmt: skip


def test_commands_that_stand_for_a_study_fix_what_they_do_not_ask() -> None:
    structure = parse_structure(["--budget=macs=50%"]).study
    assert (structure.choices.space, structure.choices.search_stages) == ("width", False)
    assert (structure.search.library_budget, structure.search.base_bounds) == (0.0, False)
    assert structure.output.out == "results/structure-resnet18-digits-macs50%"
    check = parse_rank_check(["--budget=macs=50%"])
    assert (check.proxy_images, check.study.proxy.images, check.study.search.base_bounds) == (4000, 10_000, False)


def test_an_unknown_argument_changes_nothing() -> None:
    with pytest.raises(TypeError, match="Settings has no trails"):
        changed(FULL, trails=3)
    with pytest.raises(TypeError, match="budget"):
        read(Settings, {"dataset": "digits"})


def test_notes_of_earlier_versions_are_read() -> None:
    old = {name: value for name, value in noted_settings(FULL).items() if name not in ("base_bounds", "augment")}
    assert restore_settings(old) == changed(FULL, base_bounds=False, augment=AugmentOptions())
    assert read(DataSettings, {"dataset": "folder", "unknown": 1}) == DataSettings(dataset="folder")
