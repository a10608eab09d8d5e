"""The documentation site: `sphinx-build -W docs OUT`. The pages of commands and of the API are made of the code."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from typing import Any

import nas_kd
from nas_kd.__main__ import COMMANDS

project = "nas_kd"
author = "the authors of nas_kd"
copyright = "the authors of nas_kd, Apache-2.0"
version = release = nas_kd.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
highlight_language = "text"  # where a block does not say
html_theme = "furo"
html_title = "nas_kd"
html_theme_options = {
    "source_repository": "https://github.com/nas-kd/nas-kd",
    "source_branch": "main",
    "source_directory": "docs/",
}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "code"  # as docstrings have `names`
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


_PARSERS = {
    "study": "nas_kd.arguments.study:study_parser",
    "worker": "nas_kd.arguments.worker:worker_parser",
    "rank_check": "nas_kd.rank_check.arguments:rank_parser",
    "distill": "nas_kd.arguments.distill:distill_parser",
    "structure": "nas_kd.learnt_widths.arguments:structure_parser",
    "quantize": "nas_kd.quantize:quantize_parser",
    "space": "nas_kd.space:space_parser",
    "push": "nas_kd.push:push_parser",
}


def _commands() -> str:
    """Every option of every command, of the parsers; `run` hands its arguments over."""
    parts = []
    for name, words in COMMANDS.items():
        if name in _PARSERS:
            module, _, function = _PARSERS[name].partition(":")
            parser = getattr(importlib.import_module(module), function)()
            parser.usage = argparse.SUPPRESS  # every option again
            parts.append(f"## {name}: {words}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
    return "\n".join(parts)


def _api() -> str:
    """Everything that `import nas_kd` offers."""
    parts = []
    for name in (name for name in nas_kd.__all__ if not name.startswith("_")):
        thing = getattr(nas_kd, name)
        if isinstance(thing, type):
            kind, options = "autoexception" if issubclass(thing, Exception) else "autoclass", ":members:"
        else:
            kind, options = ("autofunction" if callable(thing) else "autodata"), ""
        parts.append(f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: nas_kd.{name}\n   {options}\n```\n")
    return "\n".join(parts)


os.environ["COLUMNS"] = "88"  # of a page
_MADE = {"commands": _commands, "api": _api}


def _fill(app: Any, name: str, source: list[str]) -> None:
    if name in _MADE:
        source[0] += f"\n{_MADE[name]()}"


def _as_rst(app: Any, what: str, name: str, thing: object, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: stars are no emphasis, |x| no substitution, a trailing _ no link."""
    lines[:] = [re.sub(r"([*|_])(?![^`]*`)", r"\\\1", line) if "`" not in line else line for line in lines]


def setup(app: Any) -> None:
    app.connect("source-read", _fill)
    app.connect("autodoc-process-docstring", _as_rst)
