"""The study itself: proxies of genotypes within the budget."""

from __future__ import annotations

from typing import Any

import optuna

from nas_kd.pipeline.ahead import Begin, proxy_of, rounds_of
from nas_kd.pipeline.blocks_elsewhere import forget_blocks
from nas_kd.pipeline.helpers import Helpers
from nas_kd.pipeline.models_elsewhere import expect_models
from nas_kd.pipeline.showcase import announce
from nas_kd.preparation.cycles import note_cycles
from nas_kd.preparation.effort import note_effort
from nas_kd.preparation.job import Job, choices_made
from nas_kd.preparation.latency import note_latency
from nas_kd.preparation.materials import Materials
from nas_kd.progress import Board, Stages
from nas_kd.search.budgets import note_budget
from nas_kd.search.rungs import make_pruner
from nas_kd.search.sampler import make_sampler
from nas_kd.search.space import STARTS
from nas_kd.search.storage import open_study, storage_errors
from nas_kd.search.trials import Objective, Proxy, begin_here, count_trained, objectives
from nas_kd.search.work import Limits, settle, work
from nas_kd.search.workers import retry_dead_trials, retry_lost_trials
from nas_kd.workers.bundle import checkpoints, publish_bundle
from nas_kd.workers.pool import advance_by, pool_of, run_pool


def search(job: Job, materials: Materials, stages: Stages, helpers: Helpers | None = None) -> optuna.Study:
    """Trains proxies of genotypes within the budget until `--trials` of them have been trained: here, in rounds
    beside helpers, or by `--jobs` processes; workers may join on other machines."""
    settings = job.settings
    with storage_errors(f"use the study {settings.name!r} in its storage"):
        study = _open(job, materials)
        forget_blocks(job)
        note_latency(study, settings.latency, job.space)  # before workers join
        note_cycles(study, job.space)
        bundle = publish_bundle(job, materials, study)
        note_budget(study, job.budget)
        expect_models(job, study)
        announce(job, study)
        retry_dead_trials(study)
        retry_lost_trials(study)
        job.space.enqueue(study, min(STARTS, settings.search.trials), dearest_first=True)
        with stages.board("search", max(1, settings.search.trials - count_trained(study))) as board:
            if settings.sharing.jobs > 1:
                run_pool(pool_of(settings, job.out), study, board)
            else:
                _run_here(job, study, proxy_of(job, materials, checkpoints(bundle, job.cache)), board, helpers)
            settle(study, settings.sharing.grace_period)
    return study


def _run_here(job: Job, study: optuna.Study, proxy: Proxy, board: Board, helpers: Helpers | None) -> None:
    """Runs trials until the study has what it wants: in rounds that helpers share, and what these leave alone."""
    settings = job.settings

    def run(begin: Begin, target: int) -> None:
        limits = Limits(target=lambda: target, grace=settings.sharing.grace_period)
        objective = Objective(job.space, proxy, front_pruning=settings.search.pruner == "front", begin=begin)
        work(study, objective, limits, lambda trial: advance_by(board, trial))

    for begin, count in rounds_of(job, helpers, study, proxy) or ():
        run(begin, count_trained(study) + count)
    run(begin_here, settings.search.trials)


def _open(job: Job, materials: Materials) -> optuna.Study:
    settings, wanted = job.settings, objectives(job.space.budget, job.settings.search.maximize)
    study = open_study(
        job.storage,
        settings.name,
        directions=list(wanted.values()),
        config=_config(job, materials),
        sampler=make_sampler(settings.search.sampler, job.space, settings.seed),
        pruner=make_pruner(settings.search.pruner, settings.proxy.epochs),
    )
    study.set_metric_names(list(wanted))
    note_effort(study, job.effort)
    return study


def _config(job: Job, materials: Materials) -> dict[str, Any]:
    """What must stay the same for the trials of a study to be comparable."""
    val = materials.sample.val
    return {
        **choices_made(job.settings, job.budget),
        "teacher": materials.digest,
        "data": materials.splits.digest,
        "proxy images": len(materials.proxy_views),
        **({"validation images": len(val)} if len(val) < len(materials.splits.val) else {}),
        "library": None if job.space.library is None else job.space.library.folder.name,
    }
