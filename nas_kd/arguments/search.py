"""What is searched for and how: the arguments, and the value that holds them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass

from nas_kd.arguments.choices import add_choices
from nas_kd.arguments.latency import add_latency
from nas_kd.arguments.parsing import number, path
from nas_kd.budget import ACCELERATOR, ACCELERATORS
from nas_kd.errors import NasKdError, nearest

SAMPLERS = ("knapsack", "tpe", "nsgaii", "nsgaiii", "random")
PRUNERS = {False: ("front", "none"), True: ("sha", "hyperband", "median", "none")}  # with one objective: Optuna's own


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """The bounds of a study, and how genotypes within them are found."""

    budget: str
    levels: str = "1"
    base_bounds: bool = True
    accelerator: str = ACCELERATOR
    trials: int = 20
    sampler: str = "knapsack"
    maximize: str | None = None
    pruner: str = "front"
    library_budget: float = 0.12
    start_from: tuple[str, ...] = ()


def add_search(parser: argparse.ArgumentParser) -> None:
    """The arguments of the main command's search."""
    add = parser.add_argument_group("search").add_argument
    add(
        "--budget",
        required=True,
        metavar="B",
        help="hard upper bounds: params=1M,macs=30M,latency=4ms,cycles=400K or macs=50%% of the base",
    )
    add("--levels", metavar="L", help="shares of the budget that get a best model each: 0.25,0.5,1 (%(default)s)")
    add(
        "--base-bounds",
        action=argparse.BooleanOptionalAction,
        help="what --budget leaves out of params, MACs, peak memory and latency is bounded by the base's own (yes)",
    )
    add_latency(add)
    add_accelerator(add)
    add(
        "--trials",
        type=number(1),
        metavar="N",
        help="students to train; over-budget ones are free (%(default)s)",
    )
    add_choices(add)
    _add_sampling(add)
    add_library(add)
    add(
        "--start-from",
        action="append",
        type=path,
        default=[],
        metavar="FILE",
        help="begin with the genotype in this file too: structure.json of nas_kd.structure (repeatable)",
    )
    add(
        "--front",
        type=number(1),
        metavar="N",
        help="refine at most so many students of the front (8; 5 where images are dear)",
    )


def _add_sampling(add: Callable[..., object]) -> None:
    add(
        "--sampler",
        type=_sampler,
        metavar="NAME",
        help=f"who proposes genotypes after the warm starts: {', '.join(SAMPLERS)}, or package.module:Class of your own"
        " (knapsack, never over budget)",
    )
    add("--maximize", choices=("accuracy",), help="search for this alone, within the budget (for a front: costs too)")
    add(
        "--pruner",
        choices=list(dict.fromkeys((*PRUNERS[False], *PRUNERS[True]))),
        help="what stops trials early: front, where cheaper students are better (default); with --maximize Optuna's"
        " sha (successive halving, default), hyperband or median; or none",
    )


def _sampler(text: str) -> str:
    """The type of --sampler: a short name, or the path of the user's own, which is imported later."""
    if text not in SAMPLERS and not re.fullmatch(r"[^\W\d][\w.]*[.:][^\W\d]\w*", text):
        hint = nearest(text, SAMPLERS)
        raise argparse.ArgumentTypeError(
            f"unknown sampler {text!r}: use {', '.join(SAMPLERS)}, or package.module:Class of your own{hint}"
        )
    return text


def pruner_of(name: str | None, single: bool) -> str:
    """The pruner of a search for one objective, or for several. Raises NasKdError for one that does not go with it."""
    fitting = PRUNERS[single]
    if name is not None and name not in fitting:
        mode = "one objective (--maximize)" if single else "several objectives (no --maximize)"
        raise NasKdError(f"--pruner {name} does not go with {mode}: use {' or '.join(fitting)}")
    return name or fitting[0]


def add_accelerator(add: Callable[..., object]) -> None:
    """Whose cycles are meant."""
    add("--accelerator", choices=ACCELERATORS, help="whose cycles count (%(default)s)")


def add_library(add: Callable[..., object]) -> None:
    """How much the library of trained block choices may cost."""
    add(
        "--library-budget",
        type=number(0, float, 0.9),
        metavar="F",
        help="share of the study's work that goes into the library of trained block choices; 0: none (%(default)s)",
    )
