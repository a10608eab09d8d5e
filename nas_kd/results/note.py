"""A study in a page of Markdown: its command, its result, and what that is to be compared with."""

from __future__ import annotations

from nas_kd.budget import short
from nas_kd.results.report import headline
from nas_kd.results.rows import ModelRow, StudySummary, sort_models

_COLUMNS = ("model", "role", "val %", "test %", "params", "MACs", "latency ms")


def command_note(command: str) -> str:
    """What there is to say of a study that runs."""
    return f"Running; results follow here when it is done.\n\n```\n{command}\n```\n"


def study_note(summary: StudySummary) -> str:
    """What there is to say of a finished one: teacher, front and baselines in one table."""
    rows = "\n".join(_line(_cells(model)) for model in sort_models(summary.models))
    warnings = "\n".join(f"- {note}" for note in summary.notes)
    table = f"{_line(_COLUMNS)}\n{_line(['---'] * len(_COLUMNS))}\n{rows}"
    return f"**{headline(summary)}**\n\n```\n{summary.command}\n```\n\n{table}\n\n{warnings}\n"


def _cells(model: ModelRow) -> tuple[str, ...]:
    latency = "–" if model.latency_ms is None else f"{model.latency_ms:.2f}"
    costs = short(model.cost.params), short(model.cost.macs), latency
    return model.name, model.role, _percent(model.val_accuracy), _percent(model.test_accuracy), *costs


def _percent(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{100 * accuracy:.1f}"


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
