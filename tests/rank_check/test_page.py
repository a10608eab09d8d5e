"""A rank check as values, JSON, a sentence, a table and a page."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nas_kd.errors import OutputError
from nas_kd.rank_check.page import render_check, render_scores
from nas_kd.results.rank_rows import GroupRows, RankCheck, ScoreRow, read_check

TRUTH = (0.80, 0.84, 0.86)
DEFAULT = ("accuracy", "closed form", 100)


def row(name: str, start: str, steps: int, tau: float, seconds: float = 0.0) -> ScoreRow:
    return ScoreRow(
        name=name,
        start=start,
        steps=steps,
        lower=name == "distillation loss",
        values=(1.0, math.nan, 3.0) if math.isnan(tau) else (1.0, 2.0, 3.0),
        tau=tau,
        low=tau - 0.2,
        high=tau + 0.1,
        over_params=(-0.1, 0.4),
        regrets=(0.02, 0.0),
        seconds=seconds,
    )


@pytest.fixture
def check() -> RankCheck:
    scores = (
        row(*DEFAULT, 0.81, 9.0),
        row("distillation loss", "library", 50, 0.7, 5.0),
        row("params", "", 0, 0.68),
        row("SNIP", "fresh weights", 0, -0.1, 0.1),
        row("jacob_cov", "fresh weights", 0, math.nan, 0.1),
    )
    group = GroupRows(
        name="random",
        digests=("aa", "bb", "cc"),
        genotypes=("{}", "{}", "{}"),
        params=(1000, 2000, 3000),
        macs=(5, 6, 7),
        truth=TRUTH,
        truth_seconds=180.0,
        scores=scores,
    )
    return RankCheck(
        model="resnet18",
        teacher="t" * 16,
        data="d" * 16,
        space={"space": "width,conv", "pin": ["layer1.*:conv=standard"]},
        budget="macs=12M",
        band=0.15,
        seed=0,
        command="python -m nas_kd.rank_check --budget macs=30% --pin '<b>'",
        truth_steps=1600,
        truth_images=102_400,
        library_seconds=None,
        default=DEFAULT,
        groups=(group, replace(group, name="near")),
        environment=(("torch", "2.9.0"),),
    )


def test_json_holds_everything(check: RankCheck) -> None:
    text = check.to_json()
    assert "NaN" not in text
    again = RankCheck.from_json(text)
    assert again.to_json() == text
    assert again.groups[0].truth == TRUTH
    assert again.groups[0].row(*DEFAULT) == check.groups[0].scores[0]
    undefined = again.groups[0].row("jacob_cov", "fresh weights", 0)
    assert undefined is not None
    assert math.isnan(undefined.tau)
    assert math.isnan(undefined.values[1])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 99, "groups": []}', "nonsense"])
def test_another_file_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rank_check.json"
    path.write_text(text)
    with pytest.raises(OutputError, match="not a rank check") as caught:
        read_check(path)
    assert "\n" not in str(caught.value)


def test_no_file_is_no_check(tmp_path: Path) -> None:
    assert read_check(tmp_path / "rank_check.json") is None


def test_a_field_that_is_missing_is_refused(check: RankCheck) -> None:
    fields = json.loads(check.to_json())
    del fields["groups"][0]["scores"][0]["tau"]
    with pytest.raises(OutputError, match="not a rank check"):
        RankCheck.from_json(json.dumps(fields))


def test_the_sentence_says_what_was_measured_and_against_what(check: RankCheck) -> None:
    sentence = check.sentence()
    for part in ("3 random students at 0.85 to 1.15 of macs=12M", "accuracy after 100 steps from the closed form"):
        assert part in sentence
    assert "τ 0.81 [0.61, 0.91] with the accuracy after 1,600 steps" in sentence
    assert "params alone 0.68 [0.48, 0.78]" in sentence
    assert "2.0 points below the best" in sentence
    assert "5.0%" in sentence
    assert "without the score" in replace(check, default=("accuracy", "library", 100)).sentence()


def test_the_table_has_a_line_per_score_and_cuts_nothing(check: RankCheck) -> None:
    stream = io.StringIO()
    Console(file=stream, width=40).print(render_scores(check.groups[0], check), crop=False)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert "3 random genotypes, true accuracy 80.0 to 86.0 %" in lines[0]
    assert len(lines) == 2 + 5
    assert lines[2].split() == "accuracy closed form 100 0.81 0.61 to 0.91 -0.10 to +0.40 2.00 0.00 9.00 5.0%".split()
    assert " - to -" in lines[6]


def test_the_page_shows_every_score_and_escapes(check: RankCheck) -> None:
    text = render_check(check)
    assert text.count('class="plot"') == 6
    assert "&lt;b&gt;" in text
    assert "--pin '<b>'" not in text
    for title in ("accuracy after 100 steps from the closed form", "SNIP from fresh weights", "params"):
        assert title in text
    assert "from the library" in text
    assert "the library took" not in text
    assert "the library took 1 min 30 s, once" in render_check(replace(check, library_seconds=90.0))
