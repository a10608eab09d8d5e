"""What docstrings show runs, and what is public says everything that it takes and gives."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import optuna
import pytest

import nas_kd

ROOT = Path(nas_kd.__file__).parent
SHOWN = [path for path in sorted(ROOT.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
PUBLIC = [name for name in nas_kd.__all__ if not name.startswith("_")]
SECTIONS = {"Args", "Attributes", "Returns", "Yields", "Raises", "Example"}


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run(path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried
    assert not failed


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_shown_of_the_public_runs_as_it_stands(name: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for test in doctest.DocTestFinder(recurse=False).find(getattr(nas_kd, name), name, globs={"__name__": "yours"}):
        assert not doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_is_described(name: str) -> None:
    thing = getattr(nas_kd, name)
    described = sections(inspect.getdoc(thing) or "")
    if not inspect.isclass(thing):
        assert described["Args"] == parameters(thing)
        assert ("Returns" in described) == (inspect.signature(thing).return_annotation != "None")
    elif thing.__init__ is not Exception.__init__:
        own = sections(inspect.getdoc(thing.__init__) or "") | described
        assert parameters(thing) <= own.get("Args", set()) | own.get("Attributes", set())
    assert "Example" in described or name == "Library"  # `build_library` has one


def test_sections_are_those_of_googles_style() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found = sections(ast.get_docstring(node) or "")
                taken = {one.arg for one in ast.walk(node) if isinstance(one, ast.arg)}
                assert found.keys() <= SECTIONS, (path, node.name)
                assert found.get("Args", set()) <= taken, (path, node.name)


def sections(text: str) -> dict[str, set[str]]:
    """The sections of a docstring, and the names in each."""
    found: dict[str, set[str]] = {}
    for title, body in re.findall(r"^([A-Z][a-z]+):\n((?:    .*\n?|\n)+)", text, re.MULTILINE):
        found[title] = set(re.findall(r"^    (\w+):", body, re.MULTILINE))
    return found


def parameters(thing: Any) -> set[str]:
    return set(inspect.signature(thing).parameters)
