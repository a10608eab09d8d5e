"""What the report's sections with plots have in common."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

from nas_kd.budget import CYCLES, LATENCY, short
from nas_kd.results.axes import (
    plain_text,
)
from nas_kd.results.rows import TrialRow

COST_NAMES = {
    "params": "params",
    "macs": "MACs",
    "size": "bytes of weights",
    "peak_memory": "bytes of activations at once",
    "flash": "bytes of flash",
    "ram": "bytes of RAM",
    CYCLES: "cycles of the accelerator",
    LATENCY: "latency",
}


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


def duration(seconds: float) -> str:
    """A span of time as a person writes it.

    >>> duration(3.21), duration(72), duration(7384)
    ('3.2 s', '1 min 12 s', '2 h 3 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def trial_hover(trial: TrialRow) -> str:
    lines = [f"<b>trial {trial.number}</b> {plain_text(trial.source)}".rstrip(), trial.state]
    lines += [f"score {trial.score:.4g}"] if trial.score is not None else []
    lines += [f"{short(trial.cost.params)} params, {short(trial.cost.macs)} MACs"] if trial.cost else []
    lines += [plain_text(trial.note)] if trial.note else []
    return "<br>".join(lines)


def milliseconds(latency: float | None) -> str:
    return "" if latency is None else f"{latency:.3g} ms"
