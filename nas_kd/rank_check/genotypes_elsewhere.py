"""Genotypes of a rank check are measured by other processes and machines too: each is a job in a storage."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.storages import BaseStorage
from safetensors import SafetensorError
from safetensors.torch import load_file

from nas_kd import __version__
from nas_kd.arguments.worker import GENOTYPES as PART
from nas_kd.arguments.worker import WorkerSettings
from nas_kd.errors import ArtifactError, StudyError
from nas_kd.files.digests import digest_of
from nas_kd.files.tensors import write_tensors
from nas_kd.genotype import Genotype
from nas_kd.pipeline.models_elsewhere import more_processes
from nas_kd.preparation.cycles import note_cycles
from nas_kd.preparation.job import Job, choose_device, recipe_of, storage_url
from nas_kd.preparation.latency import note_latency
from nas_kd.progress import Advance, Stages
from nas_kd.rank_check.arguments import RankSettings
from nas_kd.rank_check.context import Check, CheckContext
from nas_kd.rank_check.parts import Measuring, parts_of, records_in
from nas_kd.rank_check.validation import Validation, validation_images
from nas_kd.search.jobs import GENOTYPES, Notes, Told, are_there, do_jobs, open_jobs, post_jobs, remove_jobs
from nas_kd.search.storage import using_storage
from nas_kd.search.workers import RetryingStudy
from nas_kd.training.ranks import current
from nas_kd.training.views import Views
from nas_kd.workers.bundle import (
    BUNDLE,
    Bundle,
    damaged,
    equip,
    fetch,
    locate,
    publish_bundle,
    read_bundle,
    settings_of,
    shared_store,
)
from nas_kd.workers.joining import find_jobs, lead_to_end

CHECK = "nas_kd rank check"  # the user attribute of these jobs: what workers need for them, beside the bundle
FOUND = "found"  # what a job notes: the records of its genotype, by part
_LOGITS = "logits"
_POLL = 1.0  # seconds between two looks for what is about to be told


@dataclass(frozen=True, slots=True, kw_only=True)
class GenotypesPlan:
    """What workers need to measure genotypes, beside a bundle: what the check is asked (`settings`, without its study),
    the `teacher` and `images` on which records depend, the `keys` of its parts, the file `logits` with what the teacher
    makes of the validation images, that in the artifact store by its SHA-256, and the `genotypes` by their jobs."""

    settings: Mapping[str, Any]
    teacher: str
    images: str
    keys: Mapping[str, str]
    logits: str
    genotypes: Mapping[str, str]
    files: Mapping[str, str]


# the check's own command


def is_asked_for(job: Job) -> bool:
    """Whether others are to measure, however short it takes."""
    return job.settings.sharing.storage is not None or job.settings.sharing.jobs > 1


def can_be_shared(check: Check) -> bool:
    """Whether others can have what the trainings need: images in arrays, and views or the base that teaches."""
    views, splits = check.materials.refine_views, check.materials.splits
    is_taught = (isinstance(views, Views) and views.folder is not None) or check.context.study.teacher.model is None
    return splits.folder is not None and is_taught and current().size == 1


def measure_with_workers(
    check: Check, measuring: Measuring, genotypes: Sequence[Genotype], count: int, advance: Advance
) -> None:
    """Measures genotypes here, in `count` processes, and wherever workers are; what others find is kept here."""
    job = check.job
    keys = {_key(measuring, genotype): genotype for genotype in genotypes}
    own = set[str]()

    def run(key: str) -> tuple[float, Notes]:
        own.add(key)
        measuring.one(keys[key], advance)
        return _score(measuring, keys[key]), {}

    def take(key: str, notes: Notes) -> None:
        measuring.take(keys[key], notes[FOUND])
        advance(measuring.words(keys[key]))

    url, grace = storage_url(job.settings.sharing, job.out), job.settings.sharing.grace_period
    with using_storage(url, grace, "share out genotypes of the rank check") as storage:
        jobs = _post(check, measuring, keys, storage)
        told = Told(jobs, keys, own, take)
        with more_processes(job, count, PART) as sleep:
            do_jobs(jobs, run, grace=grace, sleep=told.beside(sleep))
        told.tell()
        remove_jobs(storage, job.settings.name, GENOTYPES)


def _post(check: Check, measuring: Measuring, keys: Mapping[str, Genotype], storage: BaseStorage) -> RetryingStudy:
    """Posts genotypes, after all that workers need to measure them."""
    job, materials = check.job, check.materials
    _forget_older(storage, job.settings.name)
    jobs = post_jobs(storage, job.settings.name, [], GENOTYPES)
    note_latency(jobs, job.settings.latency, job.space)
    note_cycles(jobs, job.space)
    whole = dataclasses.replace(materials, sample=materials.splits, proxy_views=materials.refine_views)
    publish_bundle(job, whole, jobs)
    logits = _write_logits(check)
    store = shared_store(job.settings.sharing)
    plan = GenotypesPlan(
        settings=_without_study(check.context.settings),
        teacher=check.context.teacher,
        images=check.context.images,
        keys={part.name: part.key for part in measuring.parts},
        logits=logits,
        genotypes={key: genotype.to_json() for key, genotype in keys.items()},
        files={} if store is None else {logits: store.put(job.cache / logits)},
    )
    jobs.set_user_attr(CHECK, dataclasses.asdict(plan))
    return post_jobs(storage, job.settings.name, list(keys), GENOTYPES)


def _forget_older(storage: BaseStorage, name: str) -> None:
    """Puts away what a check of another version left when it was killed: its workers would be refused."""
    left = open_jobs(storage, name, GENOTYPES)
    if left is not None and left.user_attrs.get(BUNDLE, {}).get("version", __version__) != __version__:
        remove_jobs(storage, name, GENOTYPES)


def _without_study(settings: RankSettings) -> dict[str, Any]:
    """What a check is asked beside its study."""
    return {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name != "study"
    }


def _write_logits(check: Check) -> str:
    """The name of the file in the cache with what the teacher makes of the validation images."""
    settings, context = check.context.settings, check.context
    facts = f"{context.teacher} {context.images} {settings.val_images} {settings.study.seed}"
    name = f"validation-{digest_of(facts)}.safetensors"
    if not (check.job.cache / name).exists():
        write_tensors(check.job.cache / name, {_LOGITS: context.validation.teacher_logits})
    return name


def _key(measuring: Measuring, genotype: Genotype) -> str:
    """Names a genotype's job, and all that it depends on."""
    parts = " ".join(part.key for part in measuring.parts)
    return f"{digest_of(parts, 12)} {genotype.digest}"


def _score(measuring: Measuring, genotype: Genotype) -> float:
    """The value of a job: the truth, 0 where the long training failed."""
    truth = measuring.truth(genotype)
    return truth if math.isfinite(truth) else 0.0


# workers


def take_genotypes(settings: WorkerSettings, stages: Stages, sleep: Callable[[float], None] = time.sleep) -> int | None:
    """Measures genotypes of a rank check beside its command and other workers; returns how many, None where the storage
    has no rank check.

    Raises a NasKdError for everything that is wrong with the storage, the check or its files.
    """
    device = choose_device(settings.device if settings.ray is None else "cpu")
    with using_storage(settings.storage, settings.grace_period, "use the rank check in its storage") as storage:
        found = find_jobs(storage, settings.study_name, GENOTYPES)
        if found is None:
            return None
        name, jobs = found
        if (led := lead_to_end(settings, name, PART)) is not None:
            return led
        return _measure_if_there(jobs, settings, device, stages, sleep)


def _measure_if_there(
    jobs: RetryingStudy, settings: WorkerSettings, device: torch.device, stages: Stages, sleep: Callable[[float], None]
) -> int:
    """Measures genotypes; none where others measured the last of them meanwhile, and the jobs were put away."""
    try:
        deadline = time.monotonic() + max(settings.wait, settings.grace_period)
        while (noted := jobs.user_attrs.get(CHECK)) is None and time.monotonic() < deadline:
            sleep(_POLL)  # it is about to be told
        bundle = read_bundle(jobs)
        if noted is None or bundle is None:
            return 0
        plan = GenotypesPlan(**noted)
        cache = locate(bundle, settings.out, settings.artifacts)
        fetch(plan.files, settings.artifacts or bundle.artifacts, cache)
        measuring = _measuring(bundle, plan, cache, device, jobs.user_attrs)
        with stages.stage("training", len(plan.genotypes)) as advance:
            return do_jobs(jobs, _measured(plan, measuring, advance), grace=settings.grace_period)
    except (ArtifactError, KeyError):
        if are_there(jobs):
            raise
        return 0


def _measured(plan: GenotypesPlan, measuring: Measuring, advance: Advance) -> Callable[[str], tuple[float, Notes]]:
    """What does the job of a key, and notes what it found."""

    def run(key: str) -> tuple[float, Notes]:
        genotype = Genotype.from_json(plan.genotypes[key])
        measuring.one(genotype, advance)
        return _score(measuring, genotype), {FOUND: measuring.found(genotype)}

    return run


def _measuring(
    bundle: Bundle, plan: GenotypesPlan, cache: Path, device: torch.device, begun: Mapping[str, Any]
) -> Measuring:
    """What measures a plan's genotypes on this machine. Raises ArtifactError for a file that is missing or damaged,
    StudyError where something else would be measured."""
    measuring = Measuring(
        parts=parts_of(_context(bundle, plan, cache, device, begun)), records=records_in(cache.parent)
    )
    here = {part.name: part.key for part in measuring.parts}
    if here != plan.keys:
        raise StudyError(
            "this machine measures something else of the genotypes: use the same versions of nas_kd and timm"
        )
    return measuring


def _context(
    bundle: Bundle, plan: GenotypesPlan, cache: Path, device: torch.device, begun: Mapping[str, Any]
) -> CheckContext:
    study = settings_of(bundle)
    settings = RankSettings(study=study, **plan.settings)
    space, proxy = equip(bundle, cache, device, begun)
    path = cache / plan.logits
    try:
        logits = load_file(path)[_LOGITS]
    except (OSError, SafetensorError, KeyError) as error:
        raise damaged(path, str(error).splitlines()[0]) from error
    images = validation_images(proxy.val, settings.val_images, study.seed)
    return CheckContext(
        settings=settings,
        device=device,
        teacher=plan.teacher,
        images=plan.images,
        num_classes=bundle.num_classes,
        val=proxy.val,
        space=space.widened(1 + settings.band),
        views=proxy.views,
        validation=Validation(images=images, teacher_logits=logits, temperature=recipe_of(study, 1).temperature),
    )
