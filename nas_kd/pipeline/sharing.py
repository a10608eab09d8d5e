"""What is many is made side by side by the study and its helpers: blocks of the library, models of the results."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from nas_kd.costs.latency import limited_threads
from nas_kd.data.images import Images
from nas_kd.genotype import Genotype
from nas_kd.library.building import Make, OpenBlocks, Share, open_builder
from nas_kd.library.building import pass_over as tell_nobody
from nas_kd.library.effort import Step
from nas_kd.library.inputs import LibraryInputs
from nas_kd.library.spec import LibrarySpec
from nas_kd.pipeline import blocks_elsewhere
from nas_kd.pipeline.baselines import WantedModel, whole_space
from nas_kd.pipeline.helpers import Claims, Helpers, helping, pass_over, processes
from nas_kd.pipeline.models_elsewhere import are_shared, forget_models, train_with_workers
from nas_kd.pipeline.refining import is_refined, refine_one
from nas_kd.preparation.estimate import predicted_seconds, refined_models
from nas_kd.preparation.job import Job
from nas_kd.preparation.materials import Materials
from nas_kd.progress import Advance
from nas_kd.results.refine import Refined
from nas_kd.workers.pool import share_of_threads

LIBRARY, MODELS = "library", "models"  # the stages
WORTH = {LIBRARY: 15.0, MODELS: 30.0}  # predicted seconds must be left of them: another process takes ten to begin
_TENSORS = "tensors.safetensors"

# models of the results


def refine_all(
    job: Job,
    plan: Sequence[WantedModel],
    materials: Materials,
    advance: Advance,
    helpers: Helpers | None = None,
    first: Callable[[], object] = lambda: None,
) -> list[Refined]:
    """Trains each model of a plan, or fetches what was trained before, in as many processes as pay. Where there are
    others, this one does something else `first`, while they begin."""
    missing = (wanted for wanted in plan if not is_refined(job, wanted, materials))
    # dearest first: so all processes end at about the same time
    pending = sorted(missing, key=lambda wanted: -wanted.epochs * wanted.space.cost(wanted.genotype).macs)
    count = _for_models(job, pending)
    if are_shared(job, pending, materials):
        if helpers is not None:
            helpers.stop()
        train_with_workers(job, pending, materials, count, advance, first)
    elif count > 1:
        with (
            contextlib.nullcontext(helpers) if helpers else helping(job) as others,
            limited_threads(share_of_threads(count)),
        ):
            claims = others.share(MODELS, {"models": [_noted(job, wanted) for wanted in pending]}, count)
            first()
            claims.work(pending, functools.partial(_refine, job, materials), advance)
            claims.wait(advance)
    forget_models(job)
    return [refine_one(job, wanted, materials, advance) for wanted in plan]


def _for_models(job: Job, pending: Sequence[WantedModel]) -> int:
    """How many processes train what is left."""
    if any(wanted.start is not None for wanted in pending):
        return 1
    epochs = max((wanted.epochs for wanted in pending), default=0)
    seconds = predicted_seconds(job, 0, epochs)["refine"] * len(pending) / refined_models(job.settings)
    return processes(job, len(pending)) if seconds >= WORTH[MODELS] else 1


def _noted(job: Job, wanted: WantedModel) -> Mapping[str, Any]:
    return {
        "role": wanted.role,
        "genotype": wanted.genotype.to_json(),
        "epochs": wanted.epochs,
        "whole": wanted.space is not job.space,
    }


def train_models(job: Job, materials: Materials, plan: Mapping[str, Any], claims: Claims) -> None:
    """A helper's part of the models of the results."""
    whole = whole_space(job) if any(model["whole"] for model in plan["models"]) else None
    models = [
        WantedModel(
            role=model["role"],
            genotype=Genotype.from_json(model["genotype"]),
            space=whole if model["whole"] and whole is not None else job.space,
            epochs=model["epochs"],
        )
        for model in plan["models"]
    ]
    claims.work(models, functools.partial(_refine, job, materials), pass_over)


def _refine(job: Job, materials: Materials, wanted: WantedModel, tell: Advance) -> None:
    refine_one(job, wanted, materials, tell)


# blocks of the library


def _for_library(job: Job) -> int:
    """How many processes make the blocks of the library."""
    blocks = len(job.space.blocks)
    return processes(job, blocks, light=True) if _is_worth(job, blocks) else 1


def _is_worth(job: Job, blocks: int) -> bool:
    return predicted_seconds(job, 0, 0)["library"] * blocks / len(job.space.blocks) >= WORTH[LIBRARY]


def begin_helpers(helpers: Helpers) -> None:
    """Starts the processes that a library which is to be made will want: they import and look at the base meanwhile,
    of what comes before it some is one process's work."""
    job = helpers.job
    is_there = job.space.library is not None or any(job.cache.glob("library-*"))
    if job.settings.search.library_budget and not is_there and not blocks_elsewhere.are_open(job):
        count = _for_library(job)
        if count > 1:
            helpers.start(count)


@contextlib.contextmanager
def sharing_library(helpers: Helpers, base: nn.Module, images: Images, spec: LibrarySpec) -> Iterator[Share | None]:
    """What shares out the blocks of a library while it is built in the block, None where that does not pay. This
    process has a helper's threads, so that a block is the same whoever makes it."""
    job, inputs = helpers.job, LibraryInputs(base=base, images=images, spec=spec)
    count, is_open = _for_library(job), blocks_elsewhere.are_open(job)
    if count == 1 and not is_open:
        yield None
        return
    share = (
        functools.partial(blocks_elsewhere.make_with_workers, job, count, inputs)
        if is_open
        else functools.partial(_share_blocks, helpers, count, inputs)
    )
    with limited_threads(share_of_threads(count)):
        yield functools.partial(_share_if_worth, job, share)
    blocks_elsewhere.end_blocks(job)
    if job.settings.sharing.jobs > 1:  # others run the trials
        helpers.stop()


def _share_if_worth(job: Job, share: Share, blocks: OpenBlocks) -> Collection[str]:
    """Makes blocks of a library, beside others where that pays; returns those that these took."""
    if _is_worth(job, len(blocks.shares)):
        return share(blocks)
    for name in blocks.shares:
        blocks.make(name, blocks.report)
    return ()


def _share_blocks(helpers: Helpers, count: int, inputs: LibraryInputs, blocks: OpenBlocks) -> list[str]:
    """Makes blocks of a library beside helpers; returns those that these took."""
    inputs.write(helpers.folder / _TENSORS)
    names = list(blocks.shares)
    claims = helpers.share(LIBRARY, {"blocks": names, **inputs.facts}, count)

    def advance(words: str, share: float = 0, /) -> None:
        blocks.report(Step(words, share))

    taken = claims.work(names, functools.partial(_make_block, blocks.make), advance)
    claims.wait(advance)
    return taken


def _make_block(make: Make, name: str, tell: Advance) -> None:
    make(name, lambda step: tell(step, getattr(step, "share", 0.0)))


def make_blocks(job: Job, plan: Mapping[str, Any], claims: Claims) -> Job:
    """A helper's part of the library; the job that goes on has what students need of it."""
    inputs = LibraryInputs.read(claims.folder.parent / _TENSORS, job.space.base.to(job.device), plan)

    def share(blocks: OpenBlocks) -> tuple[str, ...]:
        claims.work(plan["blocks"], functools.partial(_make_block, blocks.make), pass_over)
        return ()

    builder = open_builder(inputs.base, job.space.analysis, inputs.images, inputs.spec, job.cache)
    return job.with_library(builder.build(tell_nobody, share))
