"""The errors that a user can cause. Each says what is wrong, why, and how to mend it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


class NasKdError(Exception):
    """Base of every error that a user can cause. The command line turns it into one line and exit code 2.

    Example:
        >>> from nas_kd import NasKdError, parse_budget
        >>> try:
        ...     parse_budget("parms=1M")
        ... except NasKdError as error:
        ...     print(str(error)[:75])
        a budget cannot bound 'parms': use params or macs; did you mean 'params'? (
    """


class BudgetError(NasKdError, ValueError):
    """A budget is malformed, cannot be met, or is exceeded."""


class GenotypeError(NasKdError, ValueError):
    """A genotype is malformed or does not fit its base."""


class ModelError(NasKdError, ValueError):
    """A model is unknown, cannot be analysed, or offers no choices."""


class PlanError(NasKdError, ValueError):
    """An exported plan does not fit the base that it names, or is damaged."""


class DataError(NasKdError, ValueError):
    """A dataset is missing, unreadable, or does not fit the model."""


class CheckpointError(NasKdError, ValueError):
    """A checkpoint cannot be read or does not fit the model."""


class DeviceError(NasKdError, RuntimeError):
    """The device that was asked for is not there."""


class OutputError(NasKdError, OSError):
    """The output folder or the storage cannot be written."""


class ArtifactError(NasKdError, ValueError):
    """A file that a worker needs is missing, was altered, or cannot be fetched."""


class TrainingError(NasKdError, RuntimeError):
    """Training cannot go on, e.g. because the loss is no longer finite."""


class RankError(NasKdError, RuntimeError):
    """Another process of a training that several share has ended."""


class StudyError(NasKdError, ValueError):
    """A study in the storage does not fit what was asked for."""


def without_password(text: str) -> str:
    """A text in which URLs have lost their passwords.

    >>> without_password("--storage=postgresql://me:secret@host/db")
    '--storage=postgresql://me:***@host/db'
    """
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?` when `word` is close to a known one, else nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
