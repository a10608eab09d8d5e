"""The study itself: proxies of genotypes within the budget."""

from __future__ import annotations

import math
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from nas_kd.budget import short
from nas_kd.pipeline.job import Job, choices_made, recipe_of
from nas_kd.pipeline.materials import Materials
from nas_kd.progress import Stages
from nas_kd.search.sampler import make_sampler
from nas_kd.search.storage import open_study, retry_dead_trials
from nas_kd.search.trials import (
    Objective,
    Proxy,
    best_score,
    cost_of,
    count_trained,
    is_trained,
    objectives,
    run_trials,
)


def search(job: Job, materials: Materials, stages: Stages) -> optuna.Study:
    """Trains proxies of genotypes within the budget until `--trials` of them have been trained."""
    settings = job.settings
    study = open_study(
        job.storage,
        settings.name,
        directions=list(objectives(job.space.budget).values()),
        config=_config(job, materials),
        sampler=make_sampler(settings.sampler, job.space, settings.seed),
    )
    study.set_metric_names(list(objectives(job.space.budget)))
    retry_dead_trials(study)
    job.space.enqueue(study)
    recipe = recipe_of(settings, settings.proxy_epochs)
    proxy = Proxy(views=materials.proxy_views, val=materials.splits.val, recipe=recipe, device=str(job.device))
    objective = Objective(job.space, proxy)
    with stages.stage("search", max(1, settings.trials - count_trained(study))) as advance:

        def tick(trial: FrozenTrial) -> None:
            if is_trained(trial):
                score = best_score(trial)
                words = "stopped, its loss is not finite" if math.isnan(score) else f"{100 * score:.1f} %"
                advance(f"trial {trial.number}: {words} at {short(cost_of(trial).params)}")

        run_trials(study, objective, trained=settings.trials, tick=tick)
    return study


def _config(job: Job, materials: Materials) -> dict[str, Any]:
    """What must stay the same for the trials of a study to be comparable."""
    return {
        **choices_made(job.settings, job.budget),
        "teacher": materials.teacher.digest,
        "data": materials.splits.digest,
        "proxy images": len(materials.proxy_views),
        "library": None if job.space.library is None else job.space.library.folder.name,
    }
