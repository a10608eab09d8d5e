"""A user's own sampler: `--sampler package.module:Class`, any class or function that gives an Optuna sampler."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution

from nas_kd.errors import StudyError, nearest
from nas_kd.search.storage import Direction

_logger = logging.getLogger(__name__)


def make_own_sampler(path: str, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler that `package.module:Class` (or `package.module.Class`) makes, with `seed` where it takes one.

    Modules are found where Python finds them, and in the working directory. Raises StudyError when there is no such
    thing, it is no sampler, or it needs more than a seed.
    """
    target = _find(path)
    if isinstance(target, type) and not issubclass(target, optuna.samplers.BaseSampler):
        raise StudyError(f"the sampler {path!r} is no optuna.samplers.BaseSampler: derive it from that")
    with _explained(f"the sampler {path!r} cannot be made: ", "; it may take a seed, and all else needs a default"):
        made = target(**({"seed": seed} if _takes_seed(target) else {}))
    if not isinstance(made, optuna.samplers.BaseSampler):
        raise StudyError(f"{path!r} gives {type(made).__name__!r}, which is no optuna.samplers.BaseSampler")
    return made


def check_own_sampler(
    path: str, seed: int, directions: Sequence[Direction], distributions: Mapping[str, BaseDistribution]
) -> None:
    """Lets a user's sampler propose once, in a study that is thrown away, before anything is trained.

    Raises StudyError when it cannot: some of Optuna's know only one objective, or only numbers.
    """
    study = optuna.create_study(directions=list(directions), sampler=make_own_sampler(path, seed))
    with _explained(f"the sampler {path!r} cannot propose for this study: ", ""):
        study.ask(dict(distributions))


def _find(path: str) -> Callable[..., Any]:
    module_name, colon, name = path.partition(":")
    if not colon:
        module_name, _, name = path.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:  # an installed script does not look there, python -m does
        sys.path.append(here)
    with _explained(f"cannot import {module_name!r} for --sampler {path}: ", ""):
        module = importlib.import_module(module_name)
    target = getattr(module, name, None)
    if not callable(target):
        known = [known for known, value in vars(module).items() if isinstance(value, type)]
        raise StudyError(f"the module {module_name!r} has no sampler {name!r}{nearest(name, known)}")
    return target  # type: ignore[no-any-return]


def _takes_seed(target: Callable[..., Any]) -> bool:
    try:
        return "seed" in inspect.signature(target).parameters
    except ValueError:  # written in another language
        return False


@contextmanager
def _explained(before: str, after: str) -> Iterator[None]:
    """Turns whatever a user's code raises into one line: `before`, the error, `after`; tracebacks are for --debug."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    except Exception as error:
        _logger.debug("the sampler failed", exc_info=error)
        words = next(iter(str(error).strip().splitlines()), "")[:200]
        raise StudyError(f"{before}{type(error).__name__}: {words}{after}") from error
