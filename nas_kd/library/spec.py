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
    """How much a library learns: from `images` augmented training images and measured on `holdout` others; entries are
    trained for `rounds` of steps with batches of `batch_size` at a peak learning rate `lr`, fewer entries each round.

    Frames with more than `largest` of the base's MACs are inherited and fitted but not trained. What passes through
    frames is kept in memory, at most `max_bytes` at once. Of a block whose entries would take more than
    `max_block_bytes` of disk only the damages are kept. `anchor` looks whether the base's batch norms have the
    statistics of other images, and anchors them then."""

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
