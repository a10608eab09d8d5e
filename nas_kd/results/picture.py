"""A picture of a student: a bar per block, how much of it is left and what it became. SVG, of text alone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from nas_kd.budget import short
from nas_kd.genotype import Choice
from nas_kd.results.axes import BLUE, GREY
from nas_kd.results.model_figures import choice_words
from nas_kd.results.rows import ModelRow

_LINE, _HEAD, _BAR = 22, 56, 240  # pixels: a block's line, the title above all, a bar of the full width
_LETTER = 7.2  # pixels, about, of a letter at this size


def student_picture(model: ModelRow) -> str:
    """An SVG of a model whose genotype is known: its name and costs, then each block from input to output."""
    genotype: Mapping[str, Choice] = model.genotype or {}
    left = 16 + _LETTER * max([len(name) for name in genotype] or [0])
    lines = [_block(name, choice, index, left) for index, (name, choice) in enumerate(genotype.items())]
    costs = f"{short(model.cost.params)} params, {short(model.cost.macs)} MACs"
    costs += "" if model.accuracy is None else f", {model.accuracy:.1%}"
    width = max(left + _BAR + 130, 24 + 9 * len(model.name))
    height = _HEAD + _LINE * len(lines) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" font-family="sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(model.name)}</text>'
        f'<text x="12" y="42" fill="#444">{escape(costs)}</text>{"".join(lines)}</svg>\n'
    )


def _block(name: str, choice: Choice, index: int, left: float) -> str:
    top, kept = _HEAD + _LINE * index, choice.width if choice.keep else 0.0
    base = f'<rect x="{left:.0f}" y="{top}" width="{_BAR}" height="16" fill="{GREY}" fill-opacity="0.25"/>'
    own = f'<rect x="{left:.0f}" y="{top}" width="{_BAR * kept:.0f}" height="16" fill="{BLUE}"/>'
    words = f'<text x="{left + _BAR + 8:.0f}" y="{top + 13}">{escape(choice_words(choice))}</text>'
    return f'<text x="{left - 8:.0f}" y="{top + 13}" text-anchor="end">{escape(name)}</text>{base}{own}{words}'
