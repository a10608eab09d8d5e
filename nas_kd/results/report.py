"""The report of a study: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

from nas_kd.budget import KINDS, LATENCY, Budget, amount, short
from nas_kd.results.figures import COST_NAMES, panels
from nas_kd.results.front import write_atomically
from nas_kd.results.page import escaped, page, panel_section
from nas_kd.results.rows import ModelRow, StudySummary, sort_models

_MISSING = "–"


def write_report(path: Path, summary: StudySummary) -> None:
    """Writes the report of a study to `path` as one HTML file of about 5 MB, atomically.

    It holds plotly itself, refers to nothing outside, and follows the reader's light or dark setting. What the summary
    lacks is named where it would stand. Raises OutputError when the file cannot be written.
    """
    write_atomically(path, render_report(summary))


def render_report(summary: StudySummary) -> str:
    """The HTML of the report. Every text of the summary is escaped."""
    numbers = count()
    sections = [
        _head(summary),
        _models(summary),
        *(panel_section(panel, lambda: f"plot-{next(numbers)}") for panel in panels(summary)),
        _trust(summary),
        _notes(summary),
        _environment(summary),
    ]
    return page(f"{summary.study_name} · nas_kd", "\n".join(sections))


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
    else:
        text += f" with {short(best.cost.params)} params and {short(best.cost.macs)} MACs"
    # Cannot happen for a model that was exported; a report never claims it without looking.
    return (
        f"{text}, {budget.explain(best.cost)}."
        if not budget.admits(best.cost)
        else f"{text}, within {_bounds(budget)}."
    )


def _bounds(budget: Budget) -> str:
    return " and ".join(f"{amount(kind, bound)} {COST_NAMES[kind]}" for kind, bound in budget.items())


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


def _head(summary: StudySummary) -> str:
    states = [trial.state for trial in summary.trials]
    trials = f"{states.count('trained') + states.count('stopped')} trials trained"
    refused = states.count("over budget")
    facts = [summary.base, summary.dataset, f"budget {summary.budget}", f"seed {summary.seed}", trials]
    facts += [f"{refused} refused over budget"] if refused else []
    lines = [
        f"<h1>{escaped(summary.study_name)}</h1>",
        f'<p class="result">{escaped(headline(summary))}</p>',
        f'<p class="facts">{" · ".join(escaped(fact) for fact in facts)}</p>',
    ]
    if summary.notes:  # they stand far below and must not be missed
        some = "1 note" if len(summary.notes) == 1 else f"{len(summary.notes)} notes"
        lines.append(f'<p class="warn">Read with care: <a href="#notes">{some} below</a>.</p>')
    return "\n".join(lines)


_Cell = tuple[str, Callable[[ModelRow, ModelRow | None], str]]
_COLUMNS: tuple[_Cell, ...] = (
    ("validation", lambda model, _: _percent(model.val_accuracy)),
    ("test", lambda model, _: _percent(model.test_accuracy)),
    ("params", lambda model, _: short(model.cost.params)),
    ("× smaller", lambda model, teacher: _ratio(model, teacher, "params")),
    ("MACs", lambda model, _: short(model.cost.macs)),
    ("× fewer", lambda model, teacher: _ratio(model, teacher, "macs")),
    ("latency", lambda model, _: _MISSING if model.latency_ms is None else f"{model.latency_ms:.2f} ms"),
)


def _columns(summary: StudySummary) -> tuple[_Cell, ...]:
    """The columns between role and path; bytes only where the budget bounds them, levels where there are several."""
    others = [kind for kind in summary.budget if kind not in (*KINDS, LATENCY)]
    bytes_each = ((kind, partial(_bytes, kind)) for kind in others)
    levels: tuple[_Cell, ...] = (("best within", _levels),) if len(summary.levels) > 1 else ()
    return (*_COLUMNS[:-1], *bytes_each, _COLUMNS[-1], *levels)


def _levels(model: ModelRow, _: ModelRow | None) -> str:
    return ", ".join(f"{level:.0%}" for level in model.best_at)


def _bytes(kind: str, model: ModelRow, _: ModelRow | None) -> str:
    return short(model.cost[kind]) if model.cost[kind] else _MISSING


def _models(summary: StudySummary) -> str:
    columns = _columns(summary)
    titles = "".join(f'<th scope="col">{title}</th>' for title, _ in columns)
    head = f'<th scope="col" class="text">model</th><th scope="col" class="text">role</th>{titles}'
    head += '<th scope="col" class="text">path</th>'
    models = sort_models(summary.models)
    groups = {
        "teacher": [model for model in models if model.role == "teacher"],
        "front": [model for model in models if model.role == "front"],
        "baselines": [model for model in models if model.role not in ("teacher", "front")],
    }
    bodies = []
    for name, members in groups.items():
        lines = "".join(_model_line(model, summary.teacher, columns) for model in members)
        bodies += [f'<tbody class="group {name}">{lines}</tbody>'] if members else []
    table = f'<table class="models"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table>'
    return (
        f'<h2>Models</h2>\n<div class="scroll" tabindex="0">{table}</div>\n{_missing_models(models)}{_loading(summary)}'
    )


def _missing_models(models: Sequence[ModelRow]) -> str:
    gaps = []
    if models and all(model.test_accuracy is None for model in models):
        gaps.append("No model was tested on the test split: the accuracies are those the search chose by.")
    if models and all(model.latency_ms is None for model in models):
        gaps.append("No latency was measured.")
    if any(model.role == "teacher" and model.accuracy is None for model in models):
        gaps.append("The teacher's accuracy is not quoted.")
    return f'<p class="missing">{" ".join(gaps)}</p>\n' if gaps else ""


def _loading(summary: StudySummary) -> str:
    best = summary.best
    if best is None or best.path is None:
        return ""
    code = f"import timm, nas_kd.models\nmodel = timm.create_model({'local-dir:' + best.path!r}, pretrained=True)"
    return f'<p class="lead">To load the best model, from the folder of this report:</p>\n<pre>{escaped(code)}</pre>'


def _model_line(model: ModelRow, teacher: ModelRow | None, columns: Sequence[_Cell]) -> str:
    cells = "".join(f"<td>{escaped(render(model, teacher))}</td>" for _, render in columns)
    name = f'<th scope="row" class="text">{escaped(model.name)}</th><td class="text">{escaped(model.role)}</td>'
    return f'<tr>{name}{cells}<td class="text">{escaped(model.path or _MISSING)}</td></tr>'


def _trust(summary: StudySummary) -> str:
    missing = "Not measured: python -m nas_kd.rank_check with the arguments of this study does."
    body = f"<p>{escaped(summary.trust)}</p>" if summary.trust else f'<p class="missing">{missing}</p>'
    return f"<h2>How far to trust the ranking</h2>\n{body}"


def _notes(summary: StudySummary) -> str:
    items = "".join(f"<li>{escaped(note)}</li>" for note in summary.notes)
    body = f"<ul>{items}</ul>" if items else '<p class="missing">Nothing to warn of.</p>'
    return f'<h2 id="notes">Notes</h2>\n{body}'


def _environment(summary: StudySummary) -> str:
    rows = "".join(
        f'<tr><th scope="row" class="text">{escaped(name)}</th><td class="text wrap">{escaped(value)}</td></tr>'
        for name, value in (("seed", str(summary.seed)), *summary.environment)
    )
    return (
        f"<h2>How to reproduce</h2>\n<pre>{escaped(summary.command)}</pre>\n"
        f'<table class="environment"><tbody>{rows}</tbody></table>'
    )


def _ratio(model: ModelRow, teacher: ModelRow | None, kind: str) -> str:
    if teacher is None or model.cost[kind] == 0:
        return _MISSING
    return f"{teacher.cost[kind] / model.cost[kind]:.1f}"


def _percent(accuracy: float | None) -> str:
    return _MISSING if accuracy is None else f"{accuracy:.1%}"
