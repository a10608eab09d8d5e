"""How much a study does where its arguments leave that open: by what an image costs and how many there are.

Everything is decided by a predicted time (`costs.forward_time`), the same on every machine and however busy it is, so
the same command does the same; it is noted on the study, and a resumed one does what it began with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import optuna
from optuna.storages import BaseStorage
from torch import nn

from nas_kd.analysis.structure import Analysis
from nas_kd.arguments.data import DataSettings
from nas_kd.arguments.parts import changed
from nas_kd.arguments.study import Settings
from nas_kd.costs.forward_time import STEP, forward_seconds
from nas_kd.data.cutting import TEST_FRACTION
from nas_kd.data.sources import Source
from nas_kd.search.space import Space
from nas_kd.search.starts import feasible_starts
from nas_kd.search.storage import begun_study

STUDENT = 0.5  # of its base's time does a student take, while its budget is not known
_MORE_EPOCHS = 3.0
_STARTS, _SLOW = 8, 0.6  # MACs to this power go with time
# at most, by default, where images are dear: predicted seconds of one core of a CPU
_TEACHER, _TRIAL, _MODEL = 900.0, 40.0, 190.0
_GPU = 10  # times as many does a GPU afford
_FEW_EPOCHS, _FEW_MODELS = 8, 5  # a front is refined for fewer epochs than that: then it has no more models than that
_NOTE = "nas_kd effort"  # the study's user attribute


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What the arguments of a study leave open: epochs and images of a trial, models of the front, and how many images
    the training of a teacher and of a model of the results may see (on a CPU; a GPU affords ten times as many)."""

    proxy_epochs: int = 4
    proxy_images: int = 10_000
    front: int = 8
    teacher_images: int = 60_000
    refine_images: int = 60_000


def effort_for(image_seconds: float, images: int, *, refine_epochs: int | None = None, gpu: bool = False) -> Effort:
    """The effort for `images` training images each of which takes `image_seconds` through the base, predicted."""
    usual, step = Effort(), STEP * max(image_seconds, 1e-9)
    trial = int((_GPU if gpu else 1) * _TRIAL / (STUDENT * step))
    proxy_images = max(2, min(usual.proxy_images, trial))
    refine_images = min(usual.refine_images, int(_MODEL / (STUDENT * step)))
    epochs = refine_epochs or (_GPU if gpu else 1) * refine_images / max(1, images)
    is_dear = refine_images < usual.refine_images and epochs < _FEW_EPOCHS
    return Effort(
        proxy_epochs=max(1, min(usual.proxy_epochs, trial // min(proxy_images, max(1, images)))),
        proxy_images=proxy_images,
        front=_FEW_MODELS if is_dear else usual.front,
        teacher_images=min(usual.teacher_images, int(_TEACHER / step)),
        refine_images=refine_images,
    )


def choose_effort(
    settings: Settings, base: nn.Module, analysis: Analysis, images: int, storage: BaseStorage, *, gpu: bool
) -> Effort:
    """What the study of this name began with, or for a new one what suits the base and its training images."""
    begun = begun_study(storage, settings.name)
    if begun is not None:
        return Effort(**begun.get(_NOTE, {}))  # an earlier version knew one effort alone
    seconds = forward_seconds(base, analysis)
    return effort_for(seconds, images, refine_epochs=settings.refinement.epochs, gpu=gpu)


def note_effort(study: optuna.Study, effort: Effort) -> None:
    """Notes on a study what it does, so that it goes on like that."""
    if _NOTE not in study.user_attrs:
        study.set_user_attr(_NOTE, asdict(effort))


def student_share(space: Space[nn.Module]) -> float:
    """Of its base's time, what a student takes, predicted from the MACs of uniform ones within the budget: small
    operations are slow for their MACs."""
    starts, base = feasible_starts(space.table, space.budget, _STARTS), space.table.base().macs
    shares = [(space.table.cost(genotype).macs / base) ** _SLOW for genotype in starts]
    return fmean(shares) if shares else STUDENT


def more_epochs(effort: Effort, share: float) -> float:
    """How many times the epochs of a student that takes half of its base's time one gets that takes this share of it:
    where images are dear, all models of the results get about the same time."""
    if effort.refine_images >= Effort().refine_images:
        return 1.0
    return min(_MORE_EPOCHS, max(1.0, STUDENT / share))


def with_effort(settings: Settings, effort: Effort) -> Settings:
    """The settings with what they leave open as `effort` says."""
    chosen: dict[str, Any] = {name: own for name, own in asdict(effort).items() if name in settings.left_open}
    return changed(settings, **chosen)


def training_images(source: Source, data: DataSettings) -> int:
    """About how many training images there are when what a dataset lacks, test and validation, is cut from them."""
    kept = (1.0 if source.test is not None else 1 - TEST_FRACTION) * (1.0 if source.val else 1 - data.val_fraction)
    count = round(kept * len(source.train_labels))
    return max(1, min(count, data.train_images or count))
