"""How the search went: the history of its trials, the importances of its parameters, its time per stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from nas_kd.results.axes import (
    BLUE,
    GREY,
    RED,
    bar_figure,
    bare_figure,
    scatter_style,
)
from nas_kd.results.figures import Panel, duration, trial_hover
from nas_kd.results.rows import State, StudySummary, TrialRow

_MOST_IMPORTANCES = 15


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
        text=[trial_hover(trial) for trial in trials],
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


def _by_number(trials: Sequence[TrialRow]) -> list[TrialRow]:
    return sorted(trials, key=lambda trial: trial.number)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
