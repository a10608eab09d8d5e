"""A rank check for a person: the table in the terminal and a page with plots."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nas_kd.budget import short
from nas_kd.results.axes import BLUE, GREY, RED, bare_figure, name_axis, plain_text, scatter_style
from nas_kd.results.figures import Panel, duration
from nas_kd.results.page import render
from nas_kd.results.rank_rows import GroupRows, RankCheck, ScoreRow, interval, share

_GREEN = "#0f9b73"
_ENDLESS = 10**6  # wider than any table
_LEFT = ("score", "from")
_GROUPS = {"random": "random genotypes", "near": "genotypes near the optimum"}
# how a score is come by: the start of its words, a legend, a colour and plotly's mark
_FAMILIES = (
    (("",), "nothing trained", GREY, "circle"),
    (("fresh weights",), "from fresh weights", RED, "x"),
    (("closed form",), "from the closed form", BLUE, "square"),
    (("library",), "from the library", _GREEN, "star"),
)


def render_scores(group: GroupRows, check: RankCheck) -> Table:
    """One line per score, the best first. Print it with `console.print(table, crop=False)`: no cell is cut."""
    titles = (
        "score",
        "from",
        "steps",
        "tau",
        "90 % interval",
        "over params",
        "regret",
        "of top 3",
        "seconds",
        "of truth",
    )
    table = Table(box=None, pad_edge=False, title=_title(group), title_justify="left")
    for title in titles:
        table.add_column(title, justify="left" if title in _LEFT else "right", no_wrap=True)
    for row in group.scores:
        ours = (row.name, row.start, row.steps) == check.default
        table.add_row(*map(Text, _cells(row, group)), style="bold" if ours else None)
    table.width = Console(width=_ENDLESS).measure(table).maximum
    return table


def _title(group: GroupRows) -> str:
    best, worst = max(group.truth), min(group.truth)
    name = _GROUPS.get(group.name, group.name)
    return f"{len(group.truth)} {name}, true accuracy {100 * worst:.1f} to {100 * best:.1f} %"


def _cells(row: ScoreRow, group: GroupRows) -> tuple[str, ...]:
    return (
        row.name,
        row.start or "-",
        str(row.steps or "-"),
        _number(row.tau),
        f"{_number(row.low)} to {_number(row.high)}",
        f"{_number(row.over_params[0], '+')} to {_number(row.over_params[1], '+')}",
        *(f"{100 * regret:.2f}" for regret in row.regrets),
        f"{row.seconds:.2f}",
        share(row.seconds, group),
    )


def _number(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.2f}"


def render_check(check: RankCheck) -> str:
    """The page: how to read it, a plot of τ, of τ over seconds, and of the study's score over the truth, per group."""
    panels = [panel for group in check.groups for panel in _panels(group, check)]
    return render("rank_check.html", f"Rank check of {check.model} · nas_kd", panels, check=check, facts=_facts(check))


def _facts(check: RankCheck) -> str:
    facts = [f"truth: {check.truth_steps:,} steps ({short(check.truth_images)} images), validation accuracy"]
    facts += [f"{duration(check.groups[0].truth_seconds)} each"]
    if check.library_seconds is not None:
        facts += [f"the library took {duration(check.library_seconds)}, once"]
    return " · ".join([*facts, f"seed {check.seed}"])


def _panels(group: GroupRows, check: RankCheck) -> tuple[Panel, Panel]:
    lead = (
        "Kendall's τ is 1 where a score orders genotypes as long training does, 0 where it knows nothing. Lines are "
        "90 % bootstrap intervals over the genotypes; the dashed line is the number of parameters: a score that does "
        "not beat it is worth nothing. A short training has one schedule of its own; scores of fewer steps are taken "
        "on its way."
    )
    taus = Panel(title=_title(group), lead=lead, figures=(("Kendall's τ of every score", _tau_figure(group)),))
    figures = [("τ over what a candidate costs", _cost_figure(group))]
    row = group.row(*check.default)
    if row is not None:
        figures.append((f"The score of a study over the truth: {row.title}", _truth_figure(group, row)))
    title = f"Cost, and a study's score: {_GROUPS.get(group.name, group.name)}"
    lead = (
        "What is paid once (teacher, views, library) is left out; the dashed line is the best score that costs nothing."
    )
    return taus, Panel(title=title, lead=lead, figures=tuple(figures))


def _families(rows: Sequence[ScoreRow]) -> list[tuple[list[tuple[int, ScoreRow]], str, str, str]]:
    """Rows with their places, by how they are come by."""
    families = []
    for starts, label, colour, symbol in _FAMILIES:
        members = [(place, row) for place, row in enumerate(rows) if row.start in starts and math.isfinite(row.tau)]
        if members:
            families.append((members, label, colour, symbol))
    return families


def _tau_figure(group: GroupRows) -> go.Figure:
    figure = bare_figure(90 + 24 * len(group.scores))
    lowest = min((row.low for row in group.scores if math.isfinite(row.tau)), default=0.0)
    for members, label, colour, symbol in _families(group.scores):
        figure.add_scatter(
            x=[row.tau for _, row in members],
            y=[place for place, _ in members],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [row.high - row.tau for _, row in members],
                "arrayminus": [row.tau - row.low for _, row in members],
                "color": colour,
                "thickness": 1.5,
                "width": 3,
            },
            text=[_hover(row) for _, row in members],
            marker={"color": colour, "symbol": symbol, "size": 9},
            **scatter_style(label),
        )
    params = group.row("params", "", 0)
    if params is not None and math.isfinite(params.tau):
        figure.add_vline(x=params.tau, line={"color": GREY, "width": 1, "dash": "dash"})
    figure.update_xaxes(title="Kendall's τ", range=(min(lowest, 0) - 0.04, 1.04))
    figure.update_yaxes(**name_axis([row.title for row in group.scores]))
    return figure


def _cost_figure(group: GroupRows) -> go.Figure:
    figure = bare_figure(380)
    for members, label, colour, symbol in _families([row for row in group.scores if row.seconds > 0]):
        figure.add_scatter(
            x=[row.seconds for _, row in members],
            y=[row.tau for _, row in members],
            text=[_hover(row) for _, row in members],
            marker={"color": colour, "symbol": symbol, "size": 9},
            **scatter_style(label),
        )
    free = [row.tau for row in group.scores if row.seconds == 0 and math.isfinite(row.tau)]
    if free:
        figure.add_hline(y=max(free), line={"color": GREY, "width": 1, "dash": "dash"})
    figure.update_xaxes(title="seconds per candidate", type="log")
    figure.update_yaxes(title="Kendall's τ")
    return figure


def _truth_figure(group: GroupRows, row: ScoreRow) -> go.Figure:
    figure = bare_figure(380)
    texts = [
        f"<b>{digest}</b><br>{short(params)} params, {short(macs)} MACs"
        for digest, params, macs in zip(group.digests, group.params, group.macs, strict=True)
    ]
    figure.add_scatter(
        x=list(row.values),
        y=list(group.truth),
        text=texts,
        marker={"color": BLUE, "symbol": "circle", "size": 9},
        **scatter_style("genotypes"),
    )
    figure.update_xaxes(title=plain_text(row.title), tickformat=".4~%" if row.name == "accuracy" else None)
    figure.update_yaxes(title="accuracy after long training", tickformat=".4~%")
    return figure


def _hover(row: ScoreRow) -> str:
    return f"<b>{plain_text(row.title)}</b><br>τ {interval(row)}<br>regret {100 * row.regrets[0]:.2f} points"
