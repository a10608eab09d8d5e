"""The report of a study: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from nas_kd.budget import KINDS, Budget, short
from nas_kd.results.figures import COST_NAMES, Panel, panels
from nas_kd.results.front import write_atomically
from nas_kd.results.rows import ModelRow, StudySummary, sort_models

_MISSING = "–"
# The page may run what it holds and load nothing, so it works offline and no text in it can call out.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2127; --soft: #5b6470; --line: #d9dde2; --tint: #f4f6f8;
  --accent: #1f6fb2; --warn: #b3541e; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --text: #e4e7eb; --soft: #9aa4b0; --line: #343a42;
  --tint: #1d2126; --accent: #69b0ee; --warn: #f0a070; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 20px; line-height: 1.3; margin: 48px 0 6px; }
p { margin: 0 0 12px; max-width: 72ch; }
a { color: var(--accent); }
.result { font-size: 19px; line-height: 1.45; overflow-wrap: anywhere; }
.facts, .lead, .missing, figcaption { color: var(--soft); }
.facts, .missing { font-size: 14px; max-width: none; }
.scroll + .lead, .scroll + .missing { margin-top: 16px; }
.warn { color: var(--warn); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
th.text, td.text { text-align: left; }
tbody th { color: inherit; }
table.models th:first-child { position: sticky; left: 0; background: var(--page); padding-left: 0; }
tbody.group { border-top: 2px solid var(--line); }
tbody.front th { color: var(--accent); }
.figures { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
figure { margin: 12px 0 0; min-width: 0; }
figcaption { font-size: 14px; font-weight: 600; margin-bottom: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: 0 0 6px; padding: 0;
  font-size: 13px; }
.legend svg { width: 16px; height: 16px; vertical-align: -3px; margin-right: 5px; overflow: visible; }
pre { background: var(--tint); border-radius: 6px; padding: 12px 14px; font: 13px/1.5 ui-monospace, SFMono-Regular,
  Menlo, Consolas, monospace; overflow-x: auto; margin: 0 0 16px; }
td.wrap { white-space: normal; overflow-wrap: anywhere; }
table.environment { width: auto; }
@media (max-width: 600px) { main { padding: 24px 16px 48px; } h1 { font-size: 23px; } .result { font-size: 17px; }
  h2 { margin-top: 36px; } th, td { padding: 7px 8px; } table.models th:first-child { min-width: 130px;
  max-width: 130px; white-space: normal; overflow-wrap: anywhere; } }
@media print { .scroll { overflow: visible; } }
"""

_SCRIPT = """
(function () {
  const plots = Array.from(document.querySelectorAll('.plot'));
  const style = function (name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); };
  const colours = function () {
    return {'font.color': style('--text'), 'font.family': getComputedStyle(document.body).fontFamily};
  };
  plots.forEach(function (plot) {
    const figure = JSON.parse(document.getElementById(plot.id + '-data').textContent);
    Object.assign(figure.layout.font, {color: style('--text'), family: getComputedStyle(document.body).fontFamily});
    Plotly.newPlot(plot, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: false});
  });
  window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', function () {
    plots.forEach(function (plot) { Plotly.relayout(plot, colours()); });
  });
})();
"""


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
        *(_panel(panel, lambda: f"plot-{next(numbers)}") for panel in panels(summary)),
        _notes(summary),
        _environment(summary),
    ]
    return _page(f"{summary.study_name} · nas_kd", "\n".join(sections))


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
    return " and ".join(f"{short(bound)} {COST_NAMES[kind]}" for kind, bound in budget.items())


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
        f"<h1>{_text(summary.study_name)}</h1>",
        f'<p class="result">{_text(headline(summary))}</p>',
        f'<p class="facts">{" · ".join(_text(fact) for fact in facts)}</p>',
    ]
    if summary.notes:  # they stand far below and must not be missed
        some = "1 note" if len(summary.notes) == 1 else f"{len(summary.notes)} notes"
        lines.append(f'<p class="warn">Read with care: <a href="#notes">{some} below</a>.</p>')
    return "\n".join(lines)


# How the legend draws plotly's markers, in a square of 16 by 16; those named "open" or "thin" are strokes.
_SHAPES = {
    "line": '<path d="M0 8H16"/>',
    "bar": '<path d="M2 2h12v12H2z"/>',
    "circle": '<circle cx="8" cy="8" r="5"/>',
    "circle-open": '<circle cx="8" cy="8" r="4.5"/>',
    "square": '<path d="M3 3h10v10H3z"/>',
    "star": '<path d="M8 0l2.1 5.6 6 .3-4.7 3.7 1.6 5.8L8 12.1l-5 3.3 1.6-5.8L-.1 5.9l6-.3z"/>',
    "triangle-up": '<path d="M8 2.5l6 10.5H2z"/>',
    "x": '<path d="M5 2l3 3 3-3 3 3-3 3 3 3-3 3-3-3-3 3-3-3 3-3-3-3z"/>',
    "x-thin-open": '<path d="M4 4l8 8M12 4l-8 8"/>',
    "line-ns-open": '<path d="M8 3v10"/>',
}
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


def _columns(budget: Budget) -> tuple[_Cell, ...]:
    """The columns between role and path; bytes only where the budget bounds them."""
    others = [kind for kind in budget if kind not in KINDS]
    return (*_COLUMNS[:-1], *((kind, partial(_bytes, kind)) for kind in others), _COLUMNS[-1])


def _bytes(kind: str, model: ModelRow, _: ModelRow | None) -> str:
    return short(model.cost[kind]) if model.cost[kind] else _MISSING


def _models(summary: StudySummary) -> str:
    columns = _columns(summary.budget)
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
    return f'<p class="lead">To load the best model, from the folder of this report:</p>\n<pre>{_text(code)}</pre>'


def _model_line(model: ModelRow, teacher: ModelRow | None, columns: Sequence[_Cell]) -> str:
    cells = "".join(f"<td>{_text(render(model, teacher))}</td>" for _, render in columns)
    name = f'<th scope="row" class="text">{_text(model.name)}</th><td class="text">{_text(model.role)}</td>'
    return f'<tr>{name}{cells}<td class="text">{_text(model.path or _MISSING)}</td></tr>'


def _panel(panel: Panel, new_id: Callable[[], str]) -> str:
    lines = [f"<h2>{_text(panel.title)}</h2>"]
    lines += [f'<p class="lead">{_text(panel.lead)}</p>'] if panel.lead else []
    figures = [_figure(caption, figure.to_json(), new_id(), panel.scrolls) for caption, figure in panel.figures]
    lines += [f'<div class="figures">{"".join(figures)}</div>'] if figures else []
    lines += [f'<p class="missing">{_text(panel.missing)}</p>'] if panel.missing else []
    return f"<section>{''.join(lines)}</section>"


def _figure(caption: str, figure_json: str, name: str, least_width: int) -> str:
    figure = json.loads(figure_json)
    data = figure_json.replace("<", "\\u003c")  # nothing in it may end the script element
    size = f"height:{figure['layout']['height']}px" + (f";min-width:{least_width}px" if least_width else "")
    plot = f'<div class="plot" id="{name}" role="img" aria-label="{_text(caption)}" style="{size}"></div>'
    return (
        f"<figure><figcaption>{_text(caption)}</figcaption>{_legend(figure['data'])}"
        f'<div class="scroll">{plot}</div><script type="application/json" id="{name}-data">{data}</script></figure>'
    )


def _legend(traces: Sequence[Mapping[str, Any]]) -> str:
    items = "".join(f"<li>{_symbol(trace)}{_text(trace['name'])}</li>" for trace in traces if trace.get("name"))
    return f'<ul class="legend">{items}</ul>' if items else ""


def _symbol(trace: Mapping[str, Any]) -> str:
    marker = trace.get("marker", {})
    shape = "bar" if trace["type"] == "bar" else marker.get("symbol", "circle") if marker else "line"
    colour = (marker or trace["line"])["color"]
    stroked = shape == "line" or shape.endswith("open")
    paint = f'fill="none" stroke="{colour}" stroke-width="2"' if stroked else f'fill="{colour}"'
    return f'<svg viewBox="0 0 16 16" aria-hidden="true" {paint}>{_SHAPES[shape]}</svg>'


def _notes(summary: StudySummary) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in summary.notes)
    body = f"<ul>{items}</ul>" if items else '<p class="missing">Nothing to warn of.</p>'
    return f'<h2 id="notes">Notes</h2>\n{body}'


def _environment(summary: StudySummary) -> str:
    rows = "".join(
        f'<tr><th scope="row" class="text">{_text(name)}</th><td class="text wrap">{_text(value)}</td></tr>'
        for name, value in (("seed", str(summary.seed)), *summary.environment)
    )
    return (
        f"<h2>How to reproduce</h2>\n<pre>{_text(summary.command)}</pre>\n"
        f'<table class="environment"><tbody>{rows}</tbody></table>'
    )


def _page(title: str, body: str) -> str:
    library = get_plotlyjs().replace("</script", "<\\/script")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<script>{library}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _ratio(model: ModelRow, teacher: ModelRow | None, kind: str) -> str:
    if teacher is None or model.cost[kind] == 0:
        return _MISSING
    return f"{teacher.cost[kind] / model.cost[kind]:.1f}"


def _percent(accuracy: float | None) -> str:
    return _MISSING if accuracy is None else f"{accuracy:.1%}"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
