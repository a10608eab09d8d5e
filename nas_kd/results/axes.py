"""What the report's plots have in common: axes, bars, and colours that suit a light and a dark page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import plotly.graph_objects as go

from nas_kd.budget import short

BLUE = "#2b7fc4"
GREY = "#8a9099"
RED = "#d2492a"
_GRID = "rgba(128,128,128,0.22)"
_LOG_FROM = 8  # a cost axis is logarithmic when its ends differ by more than this factor


def bare_figure(height: int, *, bargap: float | None = None) -> go.Figure:
    """A figure `height` pixels high with no background and neutral grid lines; `bargap` is the share between bars."""
    figure = go.Figure()
    figure.update_layout(
        template={},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13},
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        showlegend=False,  # the page writes it, as plotly gives a phone half the plot in legend
        hoverlabel={"align": "left"},
        height=height,
        barmode="group",
        bargap=bargap,
    )
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": _GRID, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def bar_figure(names: list[str], values: list[float], texts: list[str]) -> go.Figure:
    """One horizontal bar per name, the first at the top, with a text at its end."""
    figure = bare_figure(90 + 30 * len(names), bargap=0.3)
    figure.add_bar(y=list(range(len(names))), x=values, text=texts, marker_color=BLUE, **bar_style())
    figure.update_xaxes(range=bar_range(values))
    figure.update_yaxes(**name_axis(names))
    return figure


def bar_range(values: Sequence[float]) -> tuple[float, float]:
    """An axis from zero to past the longest bar."""
    return 0, 1.35 * max([*values, 1e-9])  # room for the text at the end of the longest bar


def bar_style() -> dict[str, object]:
    """Arguments of a horizontal bar trace."""
    return {
        "orientation": "h",
        "textposition": "outside",
        "textfont": {"size": 12},
        "cliponaxis": False,
        "hoverinfo": "text",
    }


def scatter_style(name: str, *, lines: bool = False) -> dict[str, object]:
    """Arguments of a scatter trace whose `text` is what the reader sees over a point."""
    return {"name": name, "mode": "lines+markers" if lines else "markers", "hovertemplate": "%{text}<extra></extra>"}


def name_axis(names: list[str]) -> dict[str, object]:
    """Arguments of an axis that holds names at 0, 1, 2, …, the first at the top."""
    # Numbers with labels, not categories: two models may share a name, and plotly would lay one over the other.
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [plain_text(name) for name in names],
        "autorange": "reversed",  # the first one at the top
        "showgrid": False,
        "zeroline": False,
    }


def cost_axis(costs: Sequence[float]) -> dict[str, object]:
    """Arguments of an axis of costs: from zero, or logarithmic where the costs span a wide range."""
    positive = [cost for cost in costs if cost > 0]
    if not positive or max(positive) / min(positive) <= _LOG_FROM:
        return {"exponentformat": "SI", "rangemode": "tozero"}
    low, high = math.log10(min(positive)), math.log10(max(positive))
    pad = 0.06 * (high - low)
    steps = (1, 2, 5) if high - low < 1.2 else (1, 3) if high - low < 2 else (1,)  # labels that fit on a phone
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    inside = [tick for tick in ticks if low - pad <= math.log10(tick) <= high + pad]
    return {
        "type": "log",
        "range": [low - pad, high + pad],
        "tickvals": inside,
        "ticktext": [short(t) for t in inside],
        "tickangle": 0,
    }


def plain_text(text: str) -> str:
    """`text` so that plotly, which reads tags and links in its texts, shows it as it is."""
    return html.escape(text, quote=False)
