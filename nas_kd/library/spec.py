"""How much a library learns, and how much of that a study can afford."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from nas_kd.analysis.structure import Analysis
from nas_kd.library.library import made_choices

_INHERIT_IMAGES = 600  # that a frame sees while an entry of it is fitted and measured, counted as forward passes
_UNBEATEN = 0.3  # of a block's choices
_LEAST_STEPS = 8  # that are worth while


@dataclass(frozen=True, slots=True, kw_only=True)
class LibrarySpec:
    """How much a library learns.

    Attributes:
        images: Augmented training images to learn from.
        holdout: Others, on which damages are measured.
        rounds: Training steps of the entries, round by round, of which each has fewer entries.
        batch_size: Images per step.
        lr: Peak learning rate.
        largest: The share of the base's MACs beyond which a frame is inherited and fitted, but not trained.
        max_bytes: Memory, at once, for what passes through frames.
        max_block_bytes: Disk that the entries of a block may take; of a larger one the damages alone are kept.
        seed: Of the order of the images.
        anchor: Whether batch norms are anchored first where they have the statistics of other images (`nas_kd.anchor`).

    Example:
        >>> from nas_kd import LibrarySpec
        >>> LibrarySpec(images=512, rounds=()).rounds  # closed forms alone: a matter of seconds for a small base
        ()
    """

    images: int = 2048
    holdout: int = 256
    rounds: tuple[int, ...] = (32, 64)
    batch_size: int = 64
    lr: float = 2e-3
    largest: float = 0.4
    max_bytes: int = 1 << 29
    max_block_bytes: int = 1 << 30
    seed: int = 0
    anchor: bool = field(default=True, repr=False)  # the base's weights name what came of it


def plan_library(spec: LibrarySpec, analysis: Analysis, images: float) -> LibrarySpec:
    """The library that costs at most about as much as `images` forward passes of the base: with fewer steps in each
    round than `spec`, or none at all. What it costs in closed form is the least that it can."""
    entries = float(np.mean([len(made_choices(block)) for block in analysis.blocks]))  # counted in whole networks
    left = images - entries * _INHERIT_IMAGES
    share = left / (entries * _UNBEATEN * 3 * spec.batch_size * max(1, sum(spec.rounds)))
    if share * sum(spec.rounds) < _LEAST_STEPS:
        return replace(spec, rounds=())
    return replace(spec, rounds=tuple(max(1, int(min(1.0, share) * steps)) for steps in spec.rounds))
