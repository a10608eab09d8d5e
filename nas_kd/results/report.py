"""The report of a study: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from nas_kd.budget import Budget, amount, short
from nas_kd.files.atomic import write_text
from nas_kd.results.advice import advice, advised, overtaken
from nas_kd.results.compare import comparison
from nas_kd.results.figures import COST_NAMES, Panel, milliseconds
from nas_kd.results.front_figure import front_panel
from nas_kd.results.model_figures import blocks_panel, latency_panel
from nas_kd.results.page import render
from nas_kd.results.rows import Int8Row, ModelRow, Role, StudySummary, best_of, sort_models
from nas_kd.results.table import bytes_shown
from nas_kd.results.trial_figures import history_panel, importances_panel, stages_panel

_MISSING = "–"


def write_report(path: Path, summary: StudySummary) -> None:
    """Writes the report of a study to `path` as one HTML file of about 5 MB, atomically.

    It holds plotly itself, refers to nothing outside, and follows the reader's light or dark setting. What the summary
    lacks is named where it would stand. Raises OutputError when the file cannot be written.
    """
    write_text(path, render_report(summary))


def render_report(summary: StudySummary) -> str:
    """The HTML of the report. Every text of the summary is escaped."""
    columns = _columns(summary)
    models = sort_models(summary.models)
    lines = [
        (model, _role(model, summary), [show(model, summary.teacher) for _, show, _ in columns]) for model in models
    ]
    groups = [(name, [line for line in lines if _group(line[0]) == name]) for name in ("teacher", "front", "baselines")]
    totals = [(column.title, tuple(cells[place] for *_, cells in lines)) for place, column in enumerate(columns)]
    return render(
        "report.html",
        f"{summary.study_name} · nas_kd",
        panels(summary),
        summary=summary,
        advice=advice(summary),
        overtaken=overtaken(summary),
        headline=headline(summary),
        beside=beside_uniform(summary.models),
        facts=_facts(summary),
        titles=[column.title for column in columns],
        key=_key(columns, models),
        groups=groups,
        comparison=comparison(summary, models, totals),
        gaps=_gaps(models),
        loading=_loading(summary),
        environment=(("seed", str(summary.seed)), *summary.environment),
    )


def panels(summary: StudySummary) -> tuple[Panel, ...]:
    """Returns all sections with plots, in the order of the report."""
    return (
        front_panel(summary),
        latency_panel(summary),
        blocks_panel(summary),
        history_panel(summary),
        importances_panel(summary),
        stages_panel(summary),
    )


def headline(summary: StudySummary) -> str:
    """The result in one sentence: the best model's accuracy, its size against the teacher's, and the budget.

    The best model is chosen by validation accuracy and quoted by test accuracy, where there is one.
    """
    best, teacher, budget = summary.best, summary.teacher, summary.budget
    if best is None:
        return f"No model was found within {_bounds(budget)}."
    text = f"{best.name}{_reaches(best, teacher)}"
    if teacher:
        text += f" with {_times(best, teacher, 'params')} and {_times(best, teacher, 'macs')} than the teacher"
        text += _speed(best, teacher)
    else:
        text += f" with {short(best.cost.params)} params and {short(best.cost.macs)} MACs"
    # Cannot happen for a model that was exported; a report never claims it without looking.
    return (
        f"{text}, {budget.explain(best.cost)}."
        if not budget.admits(best.cost)
        else f"{text}, within {_bounds(budget)}."
    )


def beside_uniform(models: Sequence[ModelRow]) -> str:
    """The best front model that is no slower than one width everywhere, beside that; empty without such a row."""
    uniform = next((model for model in models if model.role == "uniform" and model.latency_ms), None)
    if uniform is None or uniform.latency_ms is None:
        return ""
    front = [model for model in models if model.role == "front" and model.latency_ms]
    fast = best_of([model for model in front if (model.latency_ms or 0.0) <= uniform.latency_ms])
    beside = f"one width everywhere ({_percent(uniform.accuracy)} in {uniform.latency_ms:.3g} ms)"
    if fast is None:
        return f"No model of the front is as fast as {beside}."
    return f"At most as slow as {beside}: {fast.name}, {_percent(fast.accuracy)} in {fast.latency_ms:.3g} ms."


def _bounds(budget: Budget) -> str:
    asked = {kind: bound for kind, bound in budget.items() if kind not in budget.fixed}
    words = " and ".join(f"{amount(kind, bound)} {COST_NAMES[kind]}" for kind, bound in asked.items())
    return f"{words} and no worse than the base in anything" if budget.fixed else words


def _speed(best: ModelRow, teacher: ModelRow) -> str:
    """How many times faster a model is, where both were timed."""
    if not (best.latency_ms and teacher.latency_ms):
        return ""
    ratio = teacher.latency_ms / best.latency_ms
    return f", {ratio:.1f}× faster" if ratio >= 1 else f", {1 / ratio:.1f}× slower"


def _reaches(best: ModelRow, teacher: ModelRow | None) -> str:
    split = "validation" if best.test_accuracy is None else "test"
    if best.accuracy is None:
        return " was found"
    theirs = None if teacher is None else teacher.val_accuracy if split == "validation" else teacher.test_accuracy
    beside = f" (teacher {theirs:.1%})" if theirs is not None else ""
    return f" reaches {best.accuracy:.1%} {split} accuracy{beside}"


def _times(best: ModelRow, teacher: ModelRow, kind: str) -> str:
    name = COST_NAMES[kind]
    ratio = teacher.cost[kind] / max(best.cost[kind], 1)
    return f"{ratio:.1f}× fewer {name}" if ratio >= 1 else f"{1 / max(ratio, 1e-9):.1f}× more {name}"


def _facts(summary: StudySummary) -> list[str]:
    states = [trial.state for trial in summary.trials]
    refused = states.count("over budget")
    return [
        summary.base,
        summary.dataset,
        f"budget {summary.budget}".replace(",", ", "),
        f"seed {summary.seed}",
        f"{states.count('trained') + states.count('stopped')} trials trained",
        *([f"{refused} refused over budget"] if refused else []),
    ]


class _TableColumn(NamedTuple):
    """A column of the table of models: its title, what a cell shows, and what that means to somebody new."""

    title: str
    show: Callable[[ModelRow, ModelRow | None], str]
    meaning: str = ""


_BYTES = {
    "size": "size is bytes of the weights",
    "peak_memory": "peak memory is bytes of activations alive at once, in float32",
    "flash": "flash and ram are bytes of the int8 form on a microcontroller",
}
_COLUMNS = (
    _TableColumn(
        "validation", lambda model, _: _percent(model.val_accuracy), "validation images chose, test images did not"
    ),
    _TableColumn("test", lambda model, _: _percent(model.test_accuracy)),
    _TableColumn("params", lambda model, _: short(model.cost.params), "params are numbers that were learnt"),
    _TableColumn("× smaller", lambda model, teacher: _ratio(model, teacher, "params")),
    _TableColumn("MACs", lambda model, _: short(model.cost.macs), "MACs are multiplications for one image"),
    _TableColumn("× fewer", lambda model, teacher: _ratio(model, teacher, "macs")),
    _TableColumn(
        "latency", lambda model, _: milliseconds(model.latency_ms) or _MISSING, "latency is of one image at a time"
    ),
    _TableColumn("× faster", lambda model, teacher: _faster(model, teacher), "× is beside the teacher"),
)


def _columns(summary: StudySummary) -> tuple[_TableColumn, ...]:
    """The columns between role and path; activations beside the latency, other bytes where the budget bounds them or a
    device needs them, levels where there are several."""
    kinds = dict.fromkeys(("peak_memory", *bytes_shown(summary.budget, summary.models)))
    known = (kind for kind in kinds if any(model.cost[kind] for model in summary.models))
    bytes_each = (_TableColumn(kind.replace("_", " "), partial(_bytes, kind), _BYTES.get(kind, "")) for kind in known)
    levels = (_TableColumn("best within", _levels, "best within: of the budget"),) if len(summary.levels) > 1 else ()
    int8 = _INT8_COLUMNS if any(model.int8 is not None for model in summary.models) else ()
    return (*_COLUMNS, *bytes_each, *int8, *levels)


def _of_int8(show: Callable[[Int8Row], str]) -> Callable[[ModelRow, ModelRow | None], str]:
    return lambda model, _: _MISSING if model.int8 is None else show(model.int8)


_INT8_COLUMNS = (
    _TableColumn("int8 test", _of_int8(lambda int8: _percent(int8.test_accuracy))),
    _TableColumn("int8 bytes", _of_int8(lambda int8: short(int8.bytes))),
    _TableColumn("ONNX float", _of_int8(lambda int8: f"{int8.float_latency_ms:.3g} ms"), "ONNX: in ONNX Runtime"),
    _TableColumn("ONNX int8", _of_int8(lambda int8: f"{int8.latency_ms:.3g} ms")),
    _TableColumn("deploy", _of_int8(lambda int8: int8.deploy), "deploy names the file to ship"),
)
_MEANINGS: Mapping[Role, str] = {
    "teacher": "teacher, the base as it was trained on these images",
    "front": "front, what the search found",
    "uniform": "uniform, one width everywhere",
    "no teacher": "no teacher, blocks of the front trained without one",
    "random": "random, blocks drawn within the budget",
}


def _key(columns: Sequence[_TableColumn], models: Sequence[ModelRow]) -> str:
    """What columns and roles of the table mean."""
    roles = "; ".join(text for role, text in _MEANINGS.items() if any(model.role == role for model in models))
    meanings = "; ".join(column.meaning for column in columns if column.meaning)
    return f"Rows: {roles}. Columns: {meanings}. What was exported is in the folder of its name."


def _role(model: ModelRow, summary: StudySummary) -> str:
    """A model's role, and which row beats it, if any."""
    winner = next((winner for member, winner in summary.beaten if member is model), None)
    return model.role if winner is None else f"{model.role}, beaten by {winner.name}"


def _levels(model: ModelRow, _: ModelRow | None) -> str:
    return ", ".join(f"{level:.0%}" for level in model.best_at)


def _bytes(kind: str, model: ModelRow, _: ModelRow | None) -> str:
    return short(model.cost[kind]) if model.cost[kind] else _MISSING


def _group(model: ModelRow) -> str:
    return model.role if model.role in ("teacher", "front") else "baselines"


def _gaps(models: Sequence[ModelRow]) -> list[str]:
    """What the table of the models lacks, a sentence each."""
    gaps = []
    if models and all(model.test_accuracy is None for model in models):
        gaps.append("No model was tested on the test split: the accuracies are those the search chose by.")
    if models and all(model.latency_ms is None for model in models):
        gaps.append("No latency was measured.")
    if any(model.role == "teacher" and model.accuracy is None for model in models):
        gaps.append("The teacher's accuracy is not quoted.")
    return gaps


def _loading(summary: StudySummary) -> str:
    """The code that loads the model to take; empty where it was not exported."""
    model = advised(summary)
    if model is None or model.path is None:
        return ""
    return f"import timm, nas_kd.models\nmodel = timm.create_model({'local-dir:' + model.path!r}, pretrained=True)"


def _ratio(model: ModelRow, teacher: ModelRow | None, kind: str) -> str:
    if teacher is None or model.cost[kind] == 0:
        return _MISSING
    return f"{teacher.cost[kind] / model.cost[kind]:.1f}"


def _faster(model: ModelRow, teacher: ModelRow | None) -> str:
    if teacher is None or not (teacher.latency_ms and model.latency_ms):
        return _MISSING
    return f"{teacher.latency_ms / model.latency_ms:.1f}"


def _percent(accuracy: float | None) -> str:
    return _MISSING if accuracy is None else f"{accuracy:.1%}"
