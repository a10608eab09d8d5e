"""The page that reports stand on: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import count
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from nas_kd.results.figures import Panel

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


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("nas_kd.results"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.globals["shapes"] = _SHAPES
    return environment


def render(template: str, title: str, panels: Iterable[Panel], **values: Any) -> str:
    """Fills a template of this folder, which extends `page.html`; every text in `values` is escaped.

    Args:
        template: The file's name.
        title: The title of the page.
        panels: The sections with plots, which the template places.
        values: What else the template shows.

    Returns:
        The whole page, which holds plotly itself.
    """
    numbered = _numbered(panels)
    library = get_plotlyjs().replace("</script", "<\\/script")
    return _templates().get_template(template).render(title=title, plotly=library, panels=numbered, **values)


def _numbered(panels: Iterable[Panel]) -> list[dict[str, Any]]:
    """The panels as the template reads them; each figure gets an id of its own."""
    ids = (f"plot-{number}" for number in count())
    return [
        {
            "title": panel.title,
            "lead": panel.lead,
            "missing": panel.missing,
            "scrolls": panel.scrolls,
            "figures": [{"id": next(ids), **_figure(caption, figure.to_json())} for caption, figure in panel.figures],
        }
        for panel in panels
    ]


def _figure(caption: str, text: str) -> dict[str, Any]:
    figure = json.loads(text)
    return {
        "caption": caption,
        "height": figure["layout"]["height"],
        "legend": [_mark(trace) for trace in figure["data"] if trace.get("name")],
        "json": text.replace("<", "\\u003c"),  # nothing in it may end the script element
    }


def _mark(trace: Mapping[str, Any]) -> dict[str, str]:
    """How the legend shows a trace of plotly's."""
    marker = trace.get("marker", {})
    shape = "bar" if trace["type"] == "bar" else marker.get("symbol", "circle") if marker else "line"
    return {"name": trace["name"], "shape": shape, "colour": (marker or trace["line"])["color"]}
