"""The whole study as plain rows, for report and table."""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Callable, Iterable
from typing import Any

import optuna
import timm
import torch
from optuna.trial import FrozenTrial, TrialState

from nas_kd import __version__
from nas_kd.errors import OutputError
from nas_kd.preparation.job import Job
from nas_kd.preparation.materials import Materials
from nas_kd.preparation.opening import space_of
from nas_kd.progress import Stages
from nas_kd.results.rank_rows import FILE, read_check
from nas_kd.results.rows import ModelRow, StudySummary, TrialRow, mark_levels
from nas_kd.search.budgets import noted_cost
from nas_kd.search.rungs import rung_scores
from nas_kd.search.trials import best_score, importances, is_trained

_logger = logging.getLogger(__name__)


def summarise(
    job: Job, study: optuna.Study, models: Iterable[ModelRow], materials: Materials, stages: Stages
) -> StudySummary:
    """The whole study as plain rows for report and table."""
    settings = job.settings
    return StudySummary(
        study_name=settings.name,
        command=settings.output.command,
        seed=settings.seed,
        base=settings.network.model,
        dataset=settings.data.dataset,
        budget=job.budget,
        models=tuple(mark_levels(list(models), job.budget, job.space.levels)),
        trials=tuple(map(_trial_row, study.get_trials(deepcopy=False))),
        importances=importances(study),
        stages=tuple(stages.seconds.items()),
        notes=tuple(_notes(job, materials)),
        trust=_trust(job, materials),
        environment=environment_of(job),
    )


def _trial_row(trial: FrozenTrial) -> TrialRow:
    attributes = trial.user_attrs
    state: Any = "failed"
    if trial.state == TrialState.COMPLETE:
        state = "trained"
    elif trial.state == TrialState.PRUNED:
        state = "stopped" if is_trained(trial) else "over budget"
    score = best_score(trial)
    return TrialRow(
        number=trial.number,
        state=state,
        digest=attributes.get("digest", ""),
        cost=noted_cost(trial),
        score=None if math.isnan(score) else score,
        rungs=rung_scores(attributes),
        seconds=float(attributes.get("seconds", 0.0)),
        source=attributes.get("source", "sampler"),
        note=attributes.get("reason", ""),
    )


def _notes(job: Job, materials: Materials) -> Iterable[str]:
    splits = materials.splits
    yield (
        f"{len(splits.train):,} images to train on, {len(splits.val):,} cut from them to select on, "
        f"{len(splits.test):,} to test on, once."
    )
    settings = job.settings
    if settings.refinement.distill == "online":
        yield (
            f"The front's models learnt online, from scratch, each with {settings.refinement.peers - 1} peers and a"
            " teacher built from them (arXiv 1909.13063); of the peers the best on validation images was taken."
        )
    if settings.teacher.model is not None:
        yield (
            f"Students begin with the base's weights and learn from {settings.teacher.model}, which knows "
            f"{100 * materials.teacher.val_accuracy:.1f} % of the validation images (the base "
            f"{100 * materials.base.val_accuracy:.1f} %)."
        )
    if job.val_is_seen:
        yield (
            "The teacher was trained elsewhere and may have seen the validation images: they rank the students, but "
            "accuracies on them are not quoted."
        )


def _trust(job: Job, materials: Materials) -> str:
    """What a rank check of the same base, teacher and space found; empty without one."""
    try:
        check = read_check(job.out / FILE)
    except OutputError as error:
        _logger.warning("the report goes without the rank check: %s", error)
        return ""
    ours = (job.settings.network.model, materials.digest, space_of(job.settings.choices))
    if check is None or (check.model, check.teacher, check.space) != ours:
        return ""
    return check.sentence()


def environment_of(job: Job) -> tuple[tuple[str, str], ...]:
    """Versions and hardware."""
    names: list[tuple[str, Callable[[], str]]] = [
        ("nas_kd", lambda: __version__),
        ("torch", lambda: torch.__version__),
        ("timm", lambda: timm.__version__),
        ("optuna", lambda: optuna.__version__),
        ("python", platform.python_version),
        ("machine", lambda: f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        ("device", lambda: torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"),
    ]
    return tuple((name, read()) for name, read in names)
