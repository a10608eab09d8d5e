"""The table that ends a study in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nas_kd.budget import KINDS, LATENCY, ON_DEVICE, short
from nas_kd.results.rows import Int8Row, ModelRow, sort_models

# Plain ASCII: a terminal or a file of another encoding must not lose the end of a long study to a dash.
_BEFORE, _AFTER = ("model", "val %", "test %", "params", "MACs", "x smaller"), ("latency ms", "x faster", "path")
_LEVELS = "best within"
_INT8 = ("int8 %", "int8 bytes", "ms float/int8", "deploy")  # where models were quantised; ONNX Runtime's milliseconds
_LEFT = ("model", "deploy", "path")
# A line under the head and between the groups and nothing else. Its eight rows are rich's own order: top, head, line
# under the head, body, line between sections, line over the foot, foot, bottom.
_LINES = Box("    \n    \n ── \n    \n ── \n ── \n    \n    \n")
_ENDLESS = 10**6  # wider than any table
_MISSING = "-"
_GROUPS = {"teacher": 0, "front": 1}  # all other roles are baselines


def render_table(models: Sequence[ModelRow], *, folder: Path | None = None, kinds: Sequence[str] = KINDS) -> Table:
    """One line per model: the teacher, then the front, then the baselines, with a line between the groups.

    "x smaller" compares parameters with the teacher's, "x faster" latency. Of `kinds` of cost those besides params and
    MACs get a column of their own: what a budget bounds; and so do levels, where models are the best of several, and
    int8 files, where there are any. `folder` goes before each model's path, so that the path can be given to
    `timm.create_model("local-dir:…")` as it stands. No cell is ever cut, wrapped or read as markup: print the table
    with `console.print(table, crop=False)`, since a console cuts what is wider than itself, also in a file.
    """
    ordered = sort_models(list(models))
    teacher = next((model for model in ordered if model.role == "teacher"), None)
    others = bytes_shown(kinds, ordered)
    rows = [_cells(model, teacher, folder, others) for model in ordered]
    table = Table(box=_LINES, show_edge=False, pad_edge=False)
    levels = sorted({level for model in ordered for level in model.best_at})
    int8 = _INT8 if any(model.int8 is not None for model in ordered) else ()
    after = (*_AFTER[:-1], *int8, *((_LEVELS,) if len(levels) > 1 else ()), _AFTER[-1])
    for title in (*_BEFORE, *others, *after):
        table.add_column(title, justify="left" if title in _LEFT else "right", no_wrap=True)
    for index, (model, row) in enumerate(zip(ordered, rows, strict=True)):
        ends_group = index + 1 < len(ordered) and _group(ordered[index + 1]) != _group(model)
        style = "bold" if model.role == "front" else None
        shown = _int8_cells(model.int8) if int8 else ()
        best_at = (" ".join(f"{level:.0%}" for level in model.best_at),) if len(levels) > 1 else ()
        row = (*row[:-1], *shown, *best_at, row[-1])
        table.add_row(*map(Text, row), style=style, end_section=ends_group)
    # Its own width, because rich otherwise shrinks the columns to the console's (80 in a file) and cuts the path.
    endless = Console(width=_ENDLESS)
    table.width = endless.measure(table).maximum
    return table


def bytes_shown(kinds: Iterable[str], models: Sequence[ModelRow]) -> list[str]:
    """Of kinds of cost those besides params, MACs and latency, and what models take on a device where that is known."""
    known = (kind for kind in ON_DEVICE if any(model.cost[kind] for model in models))
    return [kind for kind in dict.fromkeys((*kinds, *known)) if kind not in (*KINDS, LATENCY)]


def _group(model: ModelRow) -> int:
    return _GROUPS.get(model.role, 2)


def _cells(model: ModelRow, teacher: ModelRow | None, folder: Path | None, others: Sequence[str]) -> tuple[str, ...]:
    smaller = teacher.cost.params / model.cost.params if teacher and model.cost.params else None
    times = (teacher.latency_ms if teacher else None, model.latency_ms)
    faster = times[0] / times[1] if times[0] and times[1] else None
    return (
        model.name if model.role in _GROUPS else f"{model.name} ({model.role})",
        _number(model.val_accuracy, 100, 1),
        _number(model.test_accuracy, 100, 1),
        short(model.cost.params),
        short(model.cost.macs),
        _number(smaller, 1, 1),
        *(short(model.cost[kind]) if model.cost[kind] else _MISSING for kind in others),
        _MISSING if model.latency_ms is None else f"{model.latency_ms:.3g}",
        _number(faster, 1, 1),
        _path(model, folder),
    )


def _int8_cells(int8: Int8Row | None) -> tuple[str, ...]:
    if int8 is None:
        return (_MISSING,) * len(_INT8)
    times = f"{int8.float_latency_ms:.3g}/{int8.latency_ms:.3g}"
    return f"{100 * int8.test_accuracy:.1f}", short(int8.bytes), times, int8.deploy


def _number(value: float | None, factor: float, digits: int) -> str:
    return _MISSING if value is None else f"{value * factor:.{digits}f}"


def _path(model: ModelRow, folder: Path | None) -> str:
    if model.path is None:
        return _MISSING
    return model.path if folder is None else str(folder / model.path)
