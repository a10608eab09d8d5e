"""The report's plots, as plotly figures without colours of the page, so that they suit a light and a dark one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from nas_kd.budget import LATENCY, Cost, amount, kinds_of, short
from nas_kd.genotype import Choice, group_count
from nas_kd.results.axes import (
    BLUE,
    GREY,
    RED,
    bar_figure,
    bar_range,
    bar_style,
    bare_figure,
    cost_axis,
    name_axis,
    plain,
    scatter_style,
)
from nas_kd.results.rows import ModelRow, Role, State, StudySummary, TrialRow, sort_models

COST_NAMES = {
    "params": "params",
    "macs": "MACs",
    "size": "bytes of weights",
    "peak_memory": "bytes of activations at once",
    LATENCY: "latency",
}
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
_MOST_IMPORTANCES = 15
_CONV_SHORT = {"standard": "conv", "depthwise": "dw", "blueprint": "bp", "shift": "shift"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One section of the report: a title, a sentence that says how to read it, and (caption, figure) pairs.

    `missing` says in plain words what is not shown and why, empty when all is there. `scrolls` is the least width in
    pixels at which the figures can be read, 0 when they fit any screen.
    """

    title: str
    lead: str
    figures: tuple[tuple[str, go.Figure], ...] = ()
    missing: str = ""
    scrolls: int = 0


def panels(summary: StudySummary) -> tuple[Panel, ...]:
    """All sections with plots, in the order of the report."""
    return (
        front_panel(summary),
        latency_panel(summary),
        blocks_panel(summary),
        history_panel(summary),
        importances_panel(summary),
        stages_panel(summary),
    )


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
            text=[_trial_hover(trial) for trial, _ in cloud],
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


def latency_panel(summary: StudySummary) -> Panel:
    """MACs and measured milliseconds of each model, as shares of the teacher's."""
    title = "Latency beside MACs"
    lead = (
        "Fewer MACs are not always fewer milliseconds: depthwise, group and shift convolutions are slow for their MACs."
    )
    measured = [model for model in sort_models(summary.models) if model.latency_ms]
    if len(measured) < 2:
        return Panel(title=title, lead=lead, missing="Not shown: fewer than two models have a measured latency.")
    reference = next((model for model in measured if model.role == "teacher"), max(measured, key=lambda m: m.cost.macs))
    figure = bare_figure(150 + 44 * len(measured), bargap=0.35)
    where = list(range(len(measured)))
    for name, colour, shares, texts in (
        (
            "MACs",
            GREY,
            [m.cost.macs / max(reference.cost.macs, 1) for m in measured],
            [short(m.cost.macs) for m in measured],
        ),
        (
            "latency",
            BLUE,
            _latency_shares(measured, reference),
            [_ms(m.latency_ms) for m in measured],
        ),
    ):
        figure.add_bar(y=where, x=shares, text=texts, name=name, marker_color=colour, **bar_style())
    widest = max(_latency_shares(measured, reference))
    figure.update_xaxes(tickformat=".0%", range=bar_range([widest, 1.0]), title=f"share of {plain(reference.name)}")
    figure.update_yaxes(**name_axis([model.name for model in measured]))
    figure.add_vline(x=1, line={"color": GREY, "width": 1, "dash": "dot"})
    lead += " Latency is the median of one image at a time on this machine."
    left_out = len(summary.models) - len(measured)
    missing = f"{left_out} models without a measured latency are left out." if left_out else ""
    return Panel(title=title, lead=lead, figures=(("MACs and latency of each model", figure),), missing=missing)


def _latency_shares(measured: list[ModelRow], reference: ModelRow) -> list[float]:
    return [(model.latency_ms or 0.0) / (reference.latency_ms or 1.0) for model in measured]


def blocks_panel(summary: StudySummary) -> Panel:
    """What each block became: a heat map of blocks by front models."""
    title = "What each block became"
    models = [model for model in sort_models(summary.models, ("front",)) if model.genotype]
    blocks = list(dict.fromkeys(block for model in models for block in model.genotype or ()))
    if not blocks:
        return Panel(title=title, lead="", missing="Not shown: the front holds no student whose blocks are known.")
    choices = [[_choice(model, block) for model in models] for block in blocks]
    longest = max(len(model.name) for model in models)
    figure = bare_figure(60 + 28 * len(blocks) + 4 * longest)  # the names stand aslant above the map
    figure.add_heatmap(
        z=[[choice.width if choice.keep else 0 for choice in row] for row in choices],
        text=[[choice_words(choice) for choice in row] for row in choices],
        customdata=[
            [_choice_hover(*cell) for cell in zip(blocks_of, models, row, strict=True)]
            for blocks_of, row in zip(([block] * len(models) for block in blocks), choices, strict=True)
        ],
        texttemplate="%{text}",
        hovertemplate="%{customdata}<extra></extra>",
        # 0 stands for a dropped block; a width is never 0
        colorscale=[[0, "#b9bec5"], [0.001, "#b9bec5"], [0.001, "#f1f6fb"], [1, "#4f97d1"]],
        textfont={"color": "#10151a"},  # dark enough on every colour of the scale
        zmin=0,
        zmax=1,
        xgap=2,
        ygap=2,
        colorbar={"title": "width", "tickformat": ".0%", "thickness": 12, "outlinewidth": 0},
    )
    figure.update_xaxes(**name_axis([model.name for model in models]), side="top", tickangle=-35)
    figure.update_xaxes(autorange=True)
    figure.update_yaxes(**name_axis(blocks))
    lead = "Colour and percentage: the share of the channels kept. Then the convolution and its kernel size: conv = "
    lead += "standard, dw = depthwise, bp = blueprint, g4 = 4 groups, shift. Models from dear (left) to cheap."
    caption = f"{len(blocks)} blocks of {summary.base} in {len(models)} front models"
    return Panel(title=title, lead=lead, figures=((caption, figure),), scrolls=190 + 92 * len(models))


def _choice(model: ModelRow, block: str) -> Choice:
    return model.genotype.get(block, Choice()) if model.genotype else Choice()


def choice_words(choice: Choice) -> str:
    """A choice in as few letters as will do: `50% dw 3`."""
    if not choice.keep:
        return "dropped"
    conv = "" if choice.conv is None else _CONV_SHORT.get(choice.conv) or f"g{group_count(choice.conv)}"
    kernel = "" if choice.kernel_size is None else str(choice.kernel_size)
    return " ".join(part for part in (f"{choice.width:.0%}", conv, kernel) if part)


def _choice_hover(block: str, model: ModelRow, choice: Choice) -> str:
    lines = [f"<b>{plain(block)}</b> in {plain(model.name)}"]
    if not choice.keep:
        return "<br>".join([*lines, "dropped"])
    lines.append(f"width {choice.width:.1%}")
    lines += [f"convolution {choice.conv}"] if choice.conv else []
    lines += [f"kernel {choice.kernel_size}×{choice.kernel_size}"] if choice.kernel_size else []
    return "<br>".join(lines)


def history_panel(summary: StudySummary) -> Panel:
    """The score of each trial and the best so far."""
    title = "Optimisation history"
    scored = [(trial, trial.score) for trial in _by_number(summary.trials) if _finite(trial.score)]
    scores = [score for _, score in scored if score is not None]
    if not scores:
        return Panel(title=title, lead="", missing="Not shown: no trial was trained to a score.")
    figure = bare_figure(380)
    trained = [(trial, score) for trial, score in scored if trial.state == "trained" and score is not None]
    best = [max(score for _, score in trained[: index + 1]) for index in range(len(trained))]
    figure.add_scatter(
        x=[trial.number for trial, _ in trained],
        y=best,
        name="best so far",
        mode="lines",
        line={"color": BLUE, "width": 2, "shape": "hv"},
        hoverinfo="skip",
    )
    marks: dict[State, tuple[str, str]] = {
        "trained": (BLUE, "circle"),
        "stopped": (GREY, "circle-open"),
    }
    for state, (colour, symbol) in marks.items():
        _add_trials(figure, state, [trial for trial, _ in scored if trial.state == state], (colour, symbol), None)
    floor = min(scores) - 0.08 * ((max(scores) - min(scores)) or 0.01)
    for state, mark in (("over budget", (RED, "line-ns-open")), ("failed", (RED, "x-thin-open"))):
        rest = [trial for trial in summary.trials if trial.state == state]
        _add_trials(figure, state, rest, mark, floor)
    figure.update_xaxes(title="trial")
    figure.update_yaxes(title="score", tickformat=".4~%" if min(scores) >= 0 and max(scores) <= 1 else None)
    lead = "Each dot is a trial's score; ticks at the foot are genotypes over the budget, refused before any training."
    unscored = sum(trial.state in marks and not _finite(trial.score) for trial in summary.trials)
    missing = f"{unscored} trials without a score are left out." if unscored else ""
    return Panel(title=title, lead=lead, figures=(("Score of each trial", figure),), missing=missing)


def _add_trials(
    figure: go.Figure, name: str, trials: Sequence[TrialRow], mark: tuple[str, str], level: float | None
) -> None:
    if not trials:
        return
    colour, symbol = mark
    figure.add_scatter(
        x=[trial.number for trial in trials],
        y=[trial.score if level is None else level for trial in trials],
        text=[_trial_hover(trial) for trial in trials],
        marker={"color": colour, "symbol": symbol, "size": 8, "line": {"width": 1.5, "color": colour}},
        **scatter_style(f"{name} ({len(trials)})"),
    )


def importances_panel(summary: StudySummary) -> Panel:
    """Which parameters decided the score."""
    title = "Parameter importances"
    lead = "The share of the score's variance that each parameter explains."
    shares = sorted((pair for pair in summary.importances if _finite(pair[1])), key=lambda pair: -pair[1])
    if not shares:
        why = "Not shown: they need several finished trials whose scores differ."
        return Panel(title=title, lead="", missing=why)
    shown = shares[:_MOST_IMPORTANCES]
    rest = shares[_MOST_IMPORTANCES:]
    figure = bar_figure(
        [name for name, _ in shown], [share for _, share in shown], [f"{share:.1%}" for _, share in shown]
    )
    figure.update_xaxes(tickformat=".0%", title="share of the variance")
    total = sum(share for _, share in rest)
    missing = f"{len(rest)} more parameters, {total:.1%} together, are left out." if rest else ""
    return Panel(title=title, lead=lead, figures=(("Share of the score's variance", figure),), missing=missing)


def stages_panel(summary: StudySummary) -> Panel:
    """Where the time went."""
    title = "Time per stage"
    if not summary.stages:
        return Panel(title=title, lead="", missing="Not shown: no stage was timed.")
    seconds = [value for _, value in summary.stages]
    figure = bar_figure([name for name, _ in summary.stages], seconds, [duration(value) for value in seconds])
    figure.update_xaxes(title="seconds")
    lead = f"{duration(sum(seconds))} in all."
    return Panel(title=title, lead=lead, figures=(("Seconds per stage", figure),))


def duration(seconds: float) -> str:
    """A span of time as a person writes it.

    >>> duration(3.21), duration(72), duration(7384)
    ('3.2 s', '1 min 12 s', '2 h 3 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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


def _by_number(trials: Sequence[TrialRow]) -> list[TrialRow]:
    return sorted(trials, key=lambda trial: trial.number)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _model_hover(model: ModelRow, split: str) -> str:
    accuracy = _on(split, model)
    lines = [f"<b>{plain(model.name)}</b>", _ROLE_MARKS[model.role][0]]
    lines += [f"{split} accuracy {accuracy:.1%}"] if accuracy is not None else []
    lines += [f"{short(model.cost.params)} params, {short(model.cost.macs)} MACs"]
    lines += [_ms(model.latency_ms)] if model.latency_ms else []
    return "<br>".join(lines)


def _trial_hover(trial: TrialRow) -> str:
    lines = [f"<b>trial {trial.number}</b> {plain(trial.source)}".rstrip(), trial.state]
    lines += [f"score {trial.score:.4g}"] if trial.score is not None else []
    lines += [f"{short(trial.cost.params)} params, {short(trial.cost.macs)} MACs"] if trial.cost else []
    lines += [plain(trial.note)] if trial.note else []
    return "<br>".join(lines)


def _ms(latency: float | None) -> str:
    return "" if latency is None else f"{latency:.2f} ms"
