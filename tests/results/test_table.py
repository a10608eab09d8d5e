from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from nas_kd.results.rows import ModelRow, StudySummary
from nas_kd.results.table import render_table


def printed(models: Sequence[ModelRow], *, width: int = 80, folder: Path | None = None) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(render_table(models, folder=folder), crop=False)
    return file.getvalue().splitlines()


def test_teacher_then_front_then_baselines_with_lines_between(summary: StudySummary) -> None:
    lines = printed(summary.models[::-1])
    rules = [index for index, line in enumerate(lines) if set(line.strip()) == {"─"}]
    groups = [lines[start + 1 : end] for start, end in zip(rules, [*rules[1:], None], strict=True)]
    assert [len(group) for group in groups] == [1, 6, 3]
    assert groups[0][0].startswith("resnet18 ")
    assert "resnet18-0.98M-97.8" in groups[1][0]
    assert "(uniform)" in groups[2][0]


def test_numbers_are_written_for_people(summary: StudySummary) -> None:
    cells = printed(summary.models)[4].split()
    assert cells == [
        "resnet18-0.98M-97.8",
        "97.8",
        "97.5",
        "982.1K",
        "36.34M",
        "11.4",
        "2",
        "2.8",
        "resnet18-0.98M-97.8",
    ]


def test_bytes_are_shown_where_the_budget_bounds_them(summary: StudySummary) -> None:
    file = io.StringIO()
    Console(file=file).print(render_table(summary.models[:2], kinds=("params", "macs", "peak_memory")), crop=False)
    head, _, teacher, _, first = file.getvalue().splitlines()
    assert head.split()[-6:] == ["peak_memory", "latency", "ms", "x", "faster", "path"]
    assert (teacher.split()[-4], first.split()[-4]) == ("163.8K", "65.54K")


@pytest.mark.parametrize("width", [20, 80, 300])
def test_nothing_is_cut_whatever_the_width(summary: StudySummary, width: int) -> None:
    folder = Path("results") / ("a very long name of a study " * 6).strip()
    lines = printed(summary.models, width=width, folder=folder)
    assert lines == printed(summary.models, width=1000, folder=folder)
    for model in summary.models:
        assert any(model.path is None or str(folder / model.path) in line for line in lines)
    assert "…" not in "".join(lines)


def test_columns_are_aligned(summary: StudySummary) -> None:
    wide = replace(summary.models[1], name="模型[red]x[/red]")
    lines = [line for line in printed([summary.models[0], wide, *summary.models[2:]]) if set(line.strip()) != {"─"}]
    ends = {cell_len(line[: line.rindex(" resnet18-")]) for line in lines if line.count("resnet18-") == 2}
    assert len(ends) == 1
    assert any("模型[red]x[/red]" in line for line in lines)  # markup is text


def test_missing_values_and_no_teacher(summary: StudySummary) -> None:
    bare = replace(summary.models[1], val_accuracy=None, test_accuracy=None, latency_ms=None, path=None)
    assert printed([bare])[-1].split() == ["resnet18-0.98M-97.8", "-", "-", "982.1K", "36.34M", "-", "-", "-", "-"]


def test_an_ascii_terminal_shows_it(summary: StudySummary) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file).print(render_table(summary.models), crop=False)
    file.seek(0)
    assert "resnet18-0.98M-97.8" in file.read()


def test_no_models_is_an_empty_table() -> None:
    assert printed([])[0].split()[0] == "model"
