"""Two models side by side: what they cost and reach, and what each block became in either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nas_kd.genotype import Choice, Genotype
from nas_kd.results.advice import advised
from nas_kd.results.rows import ModelRow, StudySummary

Line = tuple[str, tuple[str, ...]]  # a title, and a cell per model


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A table with a column per model: the page shows the two that are chosen, or all where scripts do not run.

    `first` are the numbers of the two columns that are shown to begin with.
    """

    models: tuple[ModelRow, ...]
    totals: tuple[Line, ...]
    blocks: tuple[Line, ...]
    first: tuple[int, int]


def comparison(summary: StudySummary, models: Sequence[ModelRow], totals: Sequence[Line]) -> Comparison | None:
    """The models whose blocks are known, in their order, with the cells of `totals` that are theirs; None of less than
    two."""
    known = [number for number, model in enumerate(models) if model.genotype is not None]
    if len(known) < 2:
        return None
    chosen = tuple(models[number] for number in known)
    own = tuple((title, tuple(cells[number] for number in known)) for title, cells in totals)
    return Comparison(models=chosen, totals=own, blocks=_block_lines(chosen), first=_first(summary, chosen))


def _first(summary: StudySummary, models: tuple[ModelRow, ...]) -> tuple[int, int]:
    """The model to take, and what it is best seen beside: the front's most accurate, else one width everywhere."""
    left = advised(summary)
    others = [model for model in models if model != left]
    uniform = [model for model in others if model.role == "uniform"]
    right = next((model for model in (summary.best, *uniform, *others) if model in others), None)
    return models.index(left) if left in models else 0, models.index(right) if right in models else 1


def _block_lines(models: tuple[ModelRow, ...]) -> tuple[Line, ...]:
    """A line per block that any of the models names, in the base's order; one that a model does not name is whole."""
    ordered = sorted(models, key=lambda model: model.role != "teacher")  # the base knows the order of all its blocks
    names = dict.fromkeys(block for model in ordered for block in model.genotype or ())
    genotypes = [model.genotype or Genotype(()) for model in models]
    return tuple((name, tuple(block_words(own.get(name, Choice())) for own in genotypes)) for name in names)


def block_words(choice: Choice) -> str:
    """A choice in words that need no key.

    >>> block_words(Choice(width=0.5, kernel_size=5, conv="depthwise")), block_words(Choice(keep=False))
    ('50% wide, depthwise 5×5', 'dropped')
    """
    if not choice.keep:
        return "dropped"
    kernel = "" if choice.kernel_size is None else f"{choice.kernel_size}×{choice.kernel_size}"
    conv = " ".join(part for part in (choice.conv or "", kernel) if part)
    return ", ".join(part for part in (f"{choice.width:.0%} wide", conv) if part)
