"""What the models of the results are like: their latency beside their MACs, and what each block became."""

from __future__ import annotations

from nas_kd.budget import short
from nas_kd.genotype import Choice, group_count
from nas_kd.results.axes import (
    BLUE,
    GREY,
    bar_range,
    bar_style,
    bare_figure,
    name_axis,
    plain_text,
)
from nas_kd.results.figures import Panel, milliseconds
from nas_kd.results.rows import ModelRow, StudySummary, sort_models

_CONV_SHORT = {"standard": "conv", "depthwise": "dw", "blueprint": "bp", "shift": "shift"}


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
            [milliseconds(m.latency_ms) for m in measured],
        ),
    ):
        figure.add_bar(y=where, x=shares, text=texts, name=name, marker_color=colour, **bar_style())
    widest = max(_latency_shares(measured, reference))
    figure.update_xaxes(
        tickformat=".0%", range=bar_range([widest, 1.0]), title=f"share of {plain_text(reference.name)}"
    )
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
    lines = [f"<b>{plain_text(block)}</b> in {plain_text(model.name)}"]
    if not choice.keep:
        return "<br>".join([*lines, "dropped"])
    lines.append(f"width {choice.width:.1%}")
    lines += [f"convolution {choice.conv}"] if choice.conv else []
    lines += [f"kernel {choice.kernel_size}×{choice.kernel_size}"] if choice.kernel_size else []
    return "<br>".join(lines)
