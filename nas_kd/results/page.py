"""The page that reports stand on: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from nas_kd.results.figures import Panel

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


def page(title: str, body: str) -> str:
    """The whole page, which holds plotly itself; `body` is HTML, `title` is not."""
    library = get_plotlyjs().replace("</script", "<\\/script")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
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


def panel_section(panel: Panel, new_id: Callable[[], str]) -> str:
    """One section with its figures; each gets an id of its own from `new_id`."""
    lines = [f"<h2>{escaped(panel.title)}</h2>"]
    lines += [f'<p class="lead">{escaped(panel.lead)}</p>'] if panel.lead else []
    figures = [_figure(caption, figure.to_json(), new_id(), panel.scrolls) for caption, figure in panel.figures]
    lines += [f'<div class="figures">{"".join(figures)}</div>'] if figures else []
    lines += [f'<p class="missing">{escaped(panel.missing)}</p>'] if panel.missing else []
    return f"<section>{''.join(lines)}</section>"


def _figure(caption: str, figure_json: str, name: str, least_width: int) -> str:
    figure = json.loads(figure_json)
    data = figure_json.replace("<", "\\u003c")  # nothing in it may end the script element
    size = f"height:{figure['layout']['height']}px" + (f";min-width:{least_width}px" if least_width else "")
    plot = f'<div class="plot" id="{name}" role="img" aria-label="{escaped(caption)}" style="{size}"></div>'
    return (
        f"<figure><figcaption>{escaped(caption)}</figcaption>{_legend(figure['data'])}"
        f'<div class="scroll">{plot}</div><script type="application/json" id="{name}-data">{data}</script></figure>'
    )


def _legend(traces: Sequence[Mapping[str, Any]]) -> str:
    items = "".join(f"<li>{_symbol(trace)}{escaped(trace['name'])}</li>" for trace in traces if trace.get("name"))
    return f'<ul class="legend">{items}</ul>' if items else ""


def _symbol(trace: Mapping[str, Any]) -> str:
    marker = trace.get("marker", {})
    shape = "bar" if trace["type"] == "bar" else marker.get("symbol", "circle") if marker else "line"
    colour = (marker or trace["line"])["color"]
    stroked = shape == "line" or shape.endswith("open")
    paint = f'fill="none" stroke="{colour}" stroke-width="2"' if stroked else f'fill="{colour}"'
    return f'<svg viewBox="0 0 16 16" aria-hidden="true" {paint}>{_SHAPES[shape]}</svg>'


def escaped(text: str) -> str:
    """Text as HTML."""
    return html.escape(text, quote=True)
