"""Where results go and what is said: the arguments, and the value that holds them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from nas_kd.arguments.parsing import path


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSettings:
    """The folder and the name of a study, the forms of its models, and what is printed; `command` is what was typed."""

    out: str | None = None
    study_name: str | None = None
    onnx: bool | None = None
    int8: bool = False
    quiet: bool = False
    debug: bool = False
    command: str = ""


def add_report(add: Callable[..., object]) -> None:
    """The arguments that say where results go and what is printed."""
    add("--out", type=path, metavar="DIR", help="output folder (results/STUDY); the same command again resumes")
    add("--study-name", metavar="NAME", help="name of the study (made of model, dataset and budget)")
    add_quiet(add)


def add_quiet(add: Callable[..., object], what: str = "print the result alone") -> None:
    """How much is printed."""
    add("-q", "--quiet", action="store_true", help=what)
    add("--debug", action="store_true", help="tracebacks and debug messages")


def add_onnx(add: Callable[..., object]) -> None:
    """Whether models are written as ONNX too."""
    add(
        "--onnx",
        action=argparse.BooleanOptionalAction,
        help="write the front's models as ONNX as well (where onnx is installed)",
    )
