"""The front as a plot: accuracy over each cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from nas_kd.budget import LATENCY, Cost, amount, kinds_of, short
from nas_kd.results.axes import (
    BLUE,
    GREY,
    RED,
    bare_figure,
    cost_axis,
    plain_text,
    scatter_style,
)
from nas_kd.results.figures import COST_NAMES, Panel, milliseconds, trial_hover
from nas_kd.results.rows import ModelRow, Role, StudySummary, TrialRow

_MILLISECOND = 10**6  # in the unit of latencies

# After Okabe and Ito's colours, moved so that each shows on white and on near-black; the shape tells the roles apart
# as well, for readers who do not see the difference.
_ROLE_MARKS: dict[Role, tuple[str, str, str]] = {
    "teacher": ("teacher", "#d98200", "star"),
    "front": ("front", BLUE, "circle"),
    "uniform": ("uniform width", "#0f9b73", "square"),
    "no teacher": ("without a teacher", "#c2599a", "triangle-up"),
    "random": ("random genotype", "#a0703c", "x"),
}


def front_panel(summary: StudySummary) -> Panel:
    """Accuracy over each cost: teacher, front, baselines, trials and budget."""
    title = "The front"
    models = [model for model in summary.models if model.accuracy is not None]
    if not models:
        return Panel(title=title, lead="", missing="Not shown: no model has an accuracy.")
    split = max(("test", "validation"), key=lambda split: sum(_on(split, model) is not None for model in models))
    points = [(model, _on(split, model)) for model in models]
    shown = [(model, accuracy) for model, accuracy in points if accuracy is not None]
    cloud = _cloud(summary.trials)
    low, high = _accuracy_range([accuracy for _, accuracy in shown], [score for _, score in cloud])
    hidden = sum(score < low for _, score in cloud)
    figures = tuple(
        (f"Accuracy over {COST_NAMES[kind]}", _front_figure(summary, kind, (shown, split), cloud, (low, high)))
        for kind in kinds_of(summary.budget)
    )
    lead = f"Up and to the left is better. Models are shown with their {split} accuracy"
    lead += ", trials with the validation accuracy of their short training." if cloud else "."
    if hidden:
        lead += f" {hidden} weaker trials lie below the plot: double-click it to see all."
    return Panel(title=title, lead=lead, figures=figures, missing=_front_gaps(summary, models, shown, cloud))


def _front_gaps(
    summary: StudySummary,
    models: list[ModelRow],
    shown: list[tuple[ModelRow, float]],
    cloud: list[tuple[TrialRow, float]],
) -> str:
    gaps = []
    if len(shown) < len(models):
        gaps.append(f"{len(models) - len(shown)} models are left out, as they lack the accuracy shown here.")
    if sum(model.role == "front" for model, _ in shown) == 1:
        gaps.append("The front has a single model: no other trial was better in accuracy or in cost.")
    if not cloud and summary.trials:
        gaps.append("Trials are not shown: no trial was trained, or the study's score is no accuracy.")
    return " ".join(gaps)


def _front_figure(
    summary: StudySummary,
    kind: str,
    models: tuple[list[tuple[ModelRow, float]], str],
    cloud: list[tuple[TrialRow, float]],
    accuracies: tuple[float, float],
) -> go.Figure:
    shown, split = models
    bound = summary.budget.get(kind)
    bound = bound / _MILLISECOND if bound and kind == LATENCY else bound
    costs = [_on_axis(kind, model.cost) for model, _ in shown]
    costs += [_on_axis(kind, trial.cost) for trial, _ in cloud if trial.cost]
    figure = bare_figure(430)
    figure.update_xaxes(**cost_axis([*costs, *([bound] if bound else [])]), title=_axis_title(kind))
    figure.update_yaxes(title="accuracy", tickformat=".4~%", range=accuracies)
    if cloud:
        figure.add_scatter(
            x=[_on_axis(kind, trial.cost) for trial, _ in cloud if trial.cost],
            y=[score for _, score in cloud],
            text=[trial_hover(trial) for trial, _ in cloud],
            marker={"color": GREY, "size": 6, "opacity": 0.4},
            **scatter_style("trials"),
        )
    for role, (label, colour, symbol) in _ROLE_MARKS.items():
        members = [
            (model, value) for model, value in sorted(shown, key=lambda p: p[0].cost[kind]) if model.role == role
        ]
        if members:
            figure.add_scatter(
                x=[_on_axis(kind, model.cost) for model, _ in members],
                y=[value for _, value in members],
                text=[_model_hover(model, split) for model, _ in members],
                marker={"color": colour, "symbol": symbol, "size": 15 if role == "teacher" else 10},
                line={"color": colour, "width": 1.5, "dash": "dot"},
                **scatter_style(label, lines=role == "front"),
            )
    if bound:
        _mark_bound(figure, bound, f"budget {amount(kind, summary.budget[kind])} ")
    return figure


def _on_axis(kind: str, cost: Cost) -> float:
    """A cost as its axis shows it: milliseconds, where it is a time."""
    return cost[kind] / _MILLISECOND if kind == LATENCY else cost[kind]


def _axis_title(kind: str) -> str:
    return "latency (ms)" if kind == LATENCY else COST_NAMES[kind]


def _mark_bound(figure: go.Figure, bound: float, text: str) -> None:
    figure.add_vline(x=bound, line={"color": RED, "width": 1.5, "dash": "dash"})
    at = math.log10(bound) if figure.layout.xaxis.type == "log" else bound  # annotations count in powers of ten
    figure.add_annotation(
        x=at, y=0, yref="paper", xanchor="right", yanchor="bottom", text=text, showarrow=False, font={"color": RED}
    )


def _accuracy_range(models: list[float], cloud: list[float]) -> tuple[float, float]:
    """The range that shows the models well: weak trials may fall out of it, models never."""
    spread = max(max(models) - min(models), 0.01)
    low = min([*models, max(min(cloud), min(models) - spread)]) if cloud else min(models)
    high = max([*models, *cloud])
    return low - 0.1 * spread, high + 0.1 * spread


def _cloud(trials: Sequence[TrialRow]) -> list[tuple[TrialRow, float]]:
    scored = [(trial, trial.score) for trial in trials if trial.cost and trial.state == "trained"]
    points = [(trial, score) for trial, score in scored if score is not None and math.isfinite(score)]
    return points if all(0 <= score <= 1 for _, score in points) else []  # a score may be no accuracy


def _on(split: str, model: ModelRow) -> float | None:
    return model.test_accuracy if split == "test" else model.val_accuracy


def _model_hover(model: ModelRow, split: str) -> str:
    accuracy = _on(split, model)
    lines = [f"<b>{plain_text(model.name)}</b>", _ROLE_MARKS[model.role][0]]
    lines += [f"{split} accuracy {accuracy:.1%}"] if accuracy is not None else []
    lines += [f"{short(model.cost.params)} params, {short(model.cost.macs)} MACs"]
    lines += [milliseconds(model.latency_ms)] if model.latency_ms else []
    return "<br>".join(lines)
