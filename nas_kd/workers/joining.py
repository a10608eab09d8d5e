"""A worker that joins a study: everything it needs comes from the study and its artifacts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import optuna
from optuna.storages import BaseStorage

from nas_kd.arguments.worker import TRIALS, WorkerSettings
from nas_kd.errors import StudyError, nearest
from nas_kd.preparation.job import choose_device
from nas_kd.progress import Stages
from nas_kd.search.jobs import GENOTYPES, open_jobs, study_of
from nas_kd.search.rungs import make_pruner
from nas_kd.search.sampler import KnapsackSampler, make_sampler
from nas_kd.search.storage import CONFIG, using_storage
from nas_kd.search.trials import Objective, count_trained
from nas_kd.search.work import Limits, work
from nas_kd.search.workers import RetryingStudy
from nas_kd.workers.bundle import Bundle, check_space, equip, locate, read_bundle, settings_of
from nas_kd.workers.pool import (
    LocalWorker,
    Worker,
    WorkerPool,
    advance_by,
    file_arguments,
    local_workers,
    run_pool,
    run_to_end,
    worker_arguments,
)
from nas_kd.workers.ray_workers import ray_workers

_POLL = 1.0  # seconds between two looks for a study that is to begin


def join(settings: WorkerSettings, stages: Stages, sleep: Callable[[float], None] = time.sleep) -> int:
    """Trains trials of a running study until it has what it wants; returns how many of them were this worker's.

    Raises a NasKdError for everything that is wrong with the storage, the study or its files.
    """
    device = choose_device(settings.device if settings.ray is None else "cpu")
    with joined(settings, sleep) as (_, study, bundle):
        if settings.ray is not None:
            with ray_workers(settings, study.study_name, TRIALS) as workers:
                return _lead(study, bundle, workers, settings, stages)
        if settings.jobs > 1:
            return _lead(study, bundle, own_workers(settings, study.study_name, TRIALS), settings, stages)
        with stages.stage("files"):
            cache = locate(bundle, settings.out, settings.artifacts)
        with stages.stage("model"):
            space, proxy = equip(bundle, cache, device, study.user_attrs)
            check_space(study, bundle, space)
        study.sampler = make_sampler(str(bundle.settings["sampler"]), space, int(bundle.settings["seed"]))
        if not isinstance(study.sampler, KnapsackSampler):  # which draws from each trial's own number
            study.sampler.reseed_rng()
        pruner = settings_of(bundle).search.pruner
        study.pruner = make_pruner(pruner, int(bundle.settings["proxy_epochs"]))
        return _work(study, Objective(space, proxy, front_pruning=pruner == "front"), settings, stages)


@contextmanager
def joined(
    settings: WorkerSettings, sleep: Callable[[float], None]
) -> Iterator[tuple[BaseStorage, optuna.Study, Bundle]]:
    """A storage, the study in it that a worker joins, and what that needs; the storage is closed after the block."""
    with using_storage(settings.storage, settings.grace_period, "use the study in its storage") as storage:
        yield storage, *find_study(storage, settings, sleep)


def _lead(
    study: optuna.Study, bundle: Bundle, workers: Sequence[Worker], settings: WorkerSettings, stages: Stages
) -> int:
    """Runs workers and returns how many trials finished meanwhile."""
    before = count_trained(study)
    pool = WorkerPool(
        workers=tuple(workers),
        trials=_wanted(study),
        epochs=int(bundle.settings["proxy_epochs"]),
        grace=settings.grace_period,
    )
    with stages.board("search", max(1, pool.trials - before)) as board:
        run_pool(pool, study, board)
    return count_trained(study) - before


def own_workers(settings: WorkerSettings, name: str, part: str) -> list[LocalWorker]:
    """A worker's own `--jobs` on this machine, for a part of the study's work."""
    command = [*worker_arguments(name, settings.grace_period, part), *file_arguments(settings)]
    return local_workers(command, settings.storage, settings.device, settings.jobs)


def lead_to_end(settings: WorkerSettings, name: str, part: str) -> int | None:
    """Runs a worker's `--jobs` for a part of a study's work to their end, where there are several or a Ray cluster has
    them: gives 0, what they did is not this worker's own; else None."""
    if settings.ray is not None:
        with ray_workers(settings, name, part) as workers:
            return run_to_end(workers)
    return run_to_end(own_workers(settings, name, part)) if settings.jobs > 1 else None


def _work(study: optuna.Study, objective: Objective, settings: WorkerSettings, stages: Stages) -> int:
    own: list[int] = []
    with stages.board("search", max(1, _wanted(study) - count_trained(study))) as board:

        def tick(trial: optuna.trial.FrozenTrial) -> None:
            own.append(trial.number)
            advance_by(board, trial)

        work(study, objective, Limits(target=lambda: _wanted(study), grace=settings.grace_period), tick)
    return len(own)


def _wanted(study: optuna.Study) -> int:
    """How many trained trials the study wants by now: its command may have been given again with more."""
    bundle = read_bundle(study)
    return int(bundle.settings["trials"]) if bundle is not None else 0


def find_study(
    storage: BaseStorage, settings: WorkerSettings, sleep: Callable[[float], None]
) -> tuple[optuna.Study, Bundle]:
    """The study to join and what it notes for its workers; waits for it to begin if asked to."""
    deadline = time.monotonic() + settings.wait
    while True:
        study = _named(storage, settings.study_name)
        bundle = None if study is None else read_bundle(study)
        if study is not None and bundle is not None:
            return study, bundle
        if time.monotonic() >= deadline:
            raise StudyError(_absent(storage, settings.study_name))
        sleep(_POLL)


def is_begun(storage: BaseStorage, settings: WorkerSettings) -> bool:
    """Whether there are trials to join, or genotypes of a rank check to measure."""
    study = _named(storage, settings.study_name)
    if study is not None and read_bundle(study) is not None:
        return True
    return find_jobs(storage, settings.study_name, GENOTYPES) is not None


def _named(storage: BaseStorage, wanted: str) -> optuna.Study | None:
    known = [other for other in optuna.get_all_study_names(storage) if study_of(other)[1] is None]
    name = the_one(known, wanted)
    if name is None:
        return None
    study = RetryingStudy(name, storage)
    return study if CONFIG in study.user_attrs or study.get_trials(deepcopy=False) else None


def find_jobs(storage: BaseStorage, wanted: str, kind: str) -> tuple[str, RetryingStudy] | None:
    """The study of the wanted name, or the only one where none is named, that has jobs of this kind, and these. Raises
    StudyError for several."""
    studies = map(study_of, optuna.get_all_study_names(storage))
    name = the_one([own for own, its in studies if its == kind], wanted)
    jobs = None if name is None else open_jobs(storage, name, kind)
    return None if name is None or jobs is None else (name, jobs)


def the_one(known: Sequence[str], wanted: str) -> str | None:
    """The study of the wanted name, or the only one where none is named; None where there is none. Raises StudyError
    for several."""
    names = [name for name in known if not wanted or name == wanted]
    if len(names) > 1:
        raise StudyError(f"the storage holds {len(names)} studies: give --study-name, e.g. {sorted(names)[0]!r}")
    return names[0] if names else None


def _absent(storage: BaseStorage, name: str) -> str:
    known = optuna.get_all_study_names(storage)
    if not known:
        return "the storage holds no study yet: start python -m nas_kd.study on it first, or --wait for that"
    if name in known or not name:
        return "the study's trials have not begun: wait until its teacher and library are done, e.g. with --wait 3600"
    return f"the storage holds no study {name!r}{nearest(name, known)}"
