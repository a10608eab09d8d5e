"""The best model within each level of a budget, wherever it is shown."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nas_kd.results.front import read_front_csv, write_front_csv
from nas_kd.results.report import render_report
from nas_kd.results.rows import StudySummary, mark_levels
from nas_kd.results.table import render_table

LEVELS = (0.1, 0.5, 1.0)


def levelled(summary: StudySummary) -> StudySummary:
    return replace(summary, models=tuple(mark_levels(summary.models, summary.budget, LEVELS)))


def test_each_level_has_its_best_model(summary: StudySummary) -> None:
    models = levelled(summary).models
    assert sorted(level for model in models for level in model.best_at) == list(LEVELS)
    assert all(model.role == "front" for model in models if model.best_at)
    members = [model for model in models if model.role == "front"]
    for level in LEVELS:
        (best,) = (model for model in members if level in model.best_at)
        inside = [model for model in members if summary.budget.scaled(level).admits(model.cost)]
        assert best.val_accuracy == max(model.val_accuracy or 0 for model in inside)


def test_a_level_without_a_model_is_nobodys(summary: StudySummary) -> None:
    models = mark_levels(summary.models, summary.budget, (1e-6, 1.0))
    assert [model.best_at for model in models if model.best_at] == [(1.0,)]


def test_the_file_keeps_them(summary: StudySummary, tmp_path: Path) -> None:
    write_front_csv(tmp_path / "front.csv", levelled(summary).models)
    read = {model.name: model.best_at for model in read_front_csv(tmp_path / "front.csv")}
    assert read == {model.name: model.best_at for model in levelled(summary).models}


def test_report_and_table_show_several_levels_and_no_single_one(summary: StudySummary) -> None:
    def printed(shown: StudySummary) -> str:
        file = io.StringIO()
        Console(file=file).print(render_table(shown.models), crop=False)
        return file.getvalue()

    one = replace(summary, models=tuple(mark_levels(summary.models, summary.budget, (1.0,))))
    for text in (printed(levelled(summary)), render_report(levelled(summary))):
        assert "best within" in text
        assert "10%" in text
    assert "best within" not in printed(one)
    assert "best within" not in render_report(one)
