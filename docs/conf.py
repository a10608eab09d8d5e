"""The documentation site: `sphinx-build -W docs OUT`. The pages of commands and of the API are made of the code."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from typing import Any

import nas_kd
from nas_kd.__main__ import COMMANDS

project = "nas_kd"
author = "the authors of nas_kd"
copyright = "the authors of nas_kd, Apache-2.0"
version = release = nas_kd.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
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
suppress_warnings = ["toc.empty_glob"]
default_role = "code"  # as docstrings have `names`
autoclass_content = "both"  # what a class is, and what makes one
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


def _commands() -> str:
    """Every option of every command, as `--help` has them; without the usage, which names them again."""
    parts = []
    for name, words in COMMANDS.items():
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            importlib.import_module(f"nas_kd.{name}").main(["--help"])
        usage, _, options = text.getvalue().partition("\n\n")
        parts.append(f"## {name}: {words}\n\n```text\n{options.strip() or usage}\n```\n")
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
    """Docstrings are plain text: stars are no emphasis, |x| no substitution, a trailing _ no link. What an example or a
    name before its colon has stays."""
    shown = False
    for number, line in enumerate(lines):
        shown = bool(line.strip()) and (shown or ">>> " in line)
        if not shown and "`" not in line:
            named, text = re.fullmatch(r"(\s*\w+:(?= )|)(.*)", line).groups()  # type: ignore[union-attr]
            lines[number] = named + re.sub(r"([*|_])", r"\\\1", text)


def setup(app: Any) -> None:
    app.connect("source-read", _fill)
    app.connect("autodoc-process-docstring", _as_rst, priority=400)  # before napoleon reads the sections
