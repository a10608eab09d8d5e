"""The models of the results: chosen, refined beside their baselines, tested once, timed and exported."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from torch import nn

from nas_kd.arguments.study import Settings
from nas_kd.budget import ACCELERATOR, COUNTED, CYCLES, LATENCY, ON_DEVICE, Budget, Cost, amount
from nas_kd.errors import ModelError
from nas_kd.genotype import Genotype
from nas_kd.networks.onnx import is_installed
from nas_kd.networks.tflite_file import has_interpreter, has_tools
from nas_kd.pipeline.baselines import WantedModel, baselines
from nas_kd.pipeline.choosing import choose_front
from nas_kd.pipeline.device import TFLITE, write_measured
from nas_kd.pipeline.helpers import Helpers
from nas_kd.pipeline.quantisation import Int8Spec, Quantised, quantised_once
from nas_kd.pipeline.sharing import refine_all
from nas_kd.preparation.augmenting import fresh_images
from nas_kd.preparation.effort import more_epochs
from nas_kd.preparation.job import Job, refine_epochs
from nas_kd.preparation.latency import latency_spec, make_meter
from nas_kd.preparation.materials import Materials
from nas_kd.progress import Advance, Stages
from nas_kd.results.export import Card, export
from nas_kd.results.refine import Refined
from nas_kd.results.rows import ModelRow, Role
from nas_kd.training.evaluation import evaluate

_logger = logging.getLogger(__name__)
_IN_INT8 = ("teacher", "front")  # the roles that become int8 where asked for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """One model of the results: what it is, what it costs and how well it does. `refined` holds the network, `int8`
    what that becomes in int8, with the files, where it was quantised."""

    role: Role
    genotype: Genotype | None
    cost: Cost
    refined: Refined
    int8: tuple[Quantised, tuple[Path, ...]] | None = None


def make_results(
    job: Job, study: optuna.Study, materials: Materials, stages: Stages, helpers: Helpers | None = None
) -> list[ModelRow]:
    """Chooses the front and its baselines, measures latency, refines, tests each once, and exports.

    What turns out slower than the budget allows is left out before it is refined.
    """
    epochs = refine_epochs(job, materials.splits.train)
    chosen = choose_front(study, job.settings.refinement.front, job.budget, job.space.levels)
    plan = [WantedModel(role="front", genotype=genotype, space=job.space, epochs=epochs) for genotype in chosen]
    plan += baselines(job, chosen[0], epochs) if job.settings.refinement.baselines else []
    plan = [_for_as_long(job, wanted) for wanted in plan]
    return make_models(job, plan, materials, stages, helpers)


def _for_as_long(job: Job, wanted: WantedModel) -> WantedModel:
    """A model of the plan with more epochs where it is cheaper than most, unless their number was asked for."""
    if job.settings.refinement.epochs:
        return wanted
    table = wanted.space.table
    share = table.cost(wanted.genotype).macs / table.base().macs
    return dataclasses.replace(wanted, epochs=round(wanted.epochs * more_epochs(job.effort, share)))


def make_models(
    job: Job, plan: Sequence[WantedModel], materials: Materials, stages: Stages, helpers: Helpers | None = None
) -> list[ModelRow]:
    """Measures the latency of each model of a plan and of the teacher, refines, tests each once, and exports."""
    with stages.stage("latency", 1 + len(plan)) as advance:
        latencies = _latencies(job, plan, advance)
    plan, latencies = _in_time(job, plan, latencies)
    teacher = functools.cache(functools.partial(_teacher_model, job, materials))
    with stages.stage("refine", sum(wanted.epochs for wanted in plan)) as advance:
        trained = refine_all(job, plan, materials, advance, helpers, first=teacher)
        models = [_timed(teacher(), latencies[0])]
        for wanted, latency, refined in zip(plan, latencies[1:], trained, strict=True):
            cost = wanted.space.cost(wanted.genotype)
            model = Model(role=wanted.role, genotype=wanted.genotype, cost=cost, refined=refined)
            models.append(_timed(model, latency))
    if job.settings.output.int8 or set(ON_DEVICE) & set(job.budget):
        models = on_device(_quantised(job, models, materials, stages), job.budget, job.settings.search.accelerator)
    with stages.stage("export", len(models)) as advance:
        rows = []
        for model in models:
            rows.append(_export(job, model, materials))
            advance(rows[-1].name)
    return rows


def _timed(model: Model, nanoseconds: int) -> Model:
    return dataclasses.replace(model, cost=dataclasses.replace(model.cost, latency=nanoseconds))


def _latencies(job: Job, plan: Sequence[WantedModel], advance: Advance) -> list[int]:
    """The latency (nanoseconds) of the teacher and of each model of the plan, as it was measured first, now or in an
    earlier run."""
    spaces = {id(wanted.space): wanted.space for wanted in plan}
    meter = job.space.costs.latency.meter if job.space.costs.latency is not None else make_meter(job.settings)
    tables = {key: space.costs.whole_models(meter) for key, space in {**spaces, id(job.space): job.space}.items()}
    wholes = [tables[id(job.space)].whole(job.space.analysis.identity)]
    advance("teacher")
    for wanted in plan:
        wholes.append(tables[id(wanted.space)].whole(wanted.genotype))
        advance(wanted.role)
    return wholes


def _in_time(job: Job, plan: Sequence[WantedModel], latencies: list[int]) -> tuple[Sequence[WantedModel], list[int]]:
    """What of a plan is kept: a front model whose trial ran on another machine may be slower here than its bound."""
    bound, known = job.budget.get(LATENCY, math.inf), job.space.base_cost().latency
    bound *= latencies[0] / known if known else 1.0  # the same share of the base on every machine
    kept = [number for number, own in enumerate(latencies[1:]) if plan[number].role != "front" or own <= bound]
    if len(kept) < len(plan):
        _logger.warning("%d models of the front are left out: slower here than the bound", len(plan) - len(kept))
    return [plan[number] for number in kept], [latencies[0], *(latencies[1 + number] for number in kept)]


def _teacher_model(job: Job, materials: Materials) -> Model:
    test = evaluate(materials.base.network, materials.splits.test)
    refined = Refined(network=materials.base.network, val_accuracy=materials.base.val_accuracy, test_accuracy=test)
    return Model(role="teacher", genotype=None, cost=job.space.table.base(), refined=refined)


def _quantised(job: Job, models: Sequence[Model], materials: Materials, stages: Stages) -> list[Model]:
    """The models, the front's and the teacher with their int8 forms; one that cannot be quantised goes without."""
    settings, splits = job.settings, materials.splits
    fresh = fresh_images(settings.data, splits.train, splits.num_classes)
    spec = Int8Spec(threads=settings.latency.threads, seed=settings.seed)
    done = []
    with stages.stage("int8", sum(model.role in _IN_INT8 for model in models)) as advance:
        for model in models:
            if model.role in _IN_INT8:
                try:
                    int8 = quantised_once(model.refined.network, splits, job.cache, spec, fresh)
                    model = dataclasses.replace(model, int8=int8)
                    advance(f"{model.role}: {100 * int8[0].int8.test_accuracy:.1f} % in int8")
                except ModelError as error:
                    _logger.warning("a model (%s) goes without int8: %s", model.role, error)
                    advance(f"{model.role}: none")
            done.append(model)
    return done


def on_device(models: Sequence[Model], budget: Budget, accelerator: str = ACCELERATOR) -> list[Model]:
    """The models with their int8 forms as a device reads them, measured where its interpreter and the accelerator's
    compiler are installed; without those of the front that turn out to be over the budget there."""
    if not has_interpreter():
        return list(models)
    if CYCLES in budget and not has_tools():
        _logger.warning("cycles are those that the table expects: pip install 'nas-kd[mcu]' to have them estimated")
        budget = budget.without(CYCLES)
    measured = [_measured_on_device(model, accelerator) for model in models]
    bounds = Budget(tuple((kind, bound) for kind, bound in budget.bounds if kind in ON_DEVICE))
    over = [model for model in measured if model.role == "front" and not bounds.admits(model.cost)]
    for model in over:
        _logger.warning("a model of the front is left out, as measured it is %s", bounds.explain(model.cost))
    return [model for model in measured if model not in over]


def _measured_on_device(model: Model, accelerator: str) -> Model:
    if model.int8 is None:
        return model
    result, files = model.int8
    try:
        found = write_measured(files[0].parent, accelerator if has_tools() else None)
    except ModelError as error:
        _logger.warning("a model (%s) goes without %s: %s", model.role, TFLITE, error)
        return model
    return dataclasses.replace(
        model,
        cost=dataclasses.replace(model.cost, **found),
        int8=(result, (*files, files[0].with_name(TFLITE))),
    )


def _export(job: Job, model: Model, materials: Materials) -> ModelRow:
    settings, refined = job.settings, model.refined
    genotype = model.genotype or job.space.analysis.identity
    name = f"{_stem(settings.network.model)}-{model.cost.params / 1e6:.2f}M-{100 * refined.test_accuracy:.1f}"
    if model.role not in ("front", "teacher"):
        name += f"-{model.role.replace(' ', '-')}"
    name += f"-{genotype.digest[:4]}" if _taken(job.out / name, genotype) else ""
    # a teacher from elsewhere may have seen the validation images: its accuracy there, and its students', mean nothing
    val = None if job.val_is_seen else refined.val_accuracy
    facts = {
        "role": model.role,
        "digest": genotype.digest,
        "genotype": genotype.to_json(),
        **{kind: model.cost[kind] for kind in (*COUNTED, *ON_DEVICE) if kind in COUNTED or model.cost[kind]},
        "latency": f"{amount(LATENCY, model.cost.latency)} ({latency_spec(settings.latency)})",
        "test accuracy": round(refined.test_accuracy, 4),
        **({"distillation": settings.refinement.distill} if model.role not in ("teacher", "no teacher") else {}),
        **({} if model.int8 is None else model.int8[0].facts),
        "dataset": settings.data.dataset,
        "command": settings.output.command,
        "seed": settings.seed,
    }
    card = Card(
        input_size=job.space.input_size,
        mean=materials.splits.mean,
        std=materials.splits.std,
        **dataclasses.asdict(materials.splits.preprocessing),
        label_names=materials.splits.class_names,
        facts=facts,
        title=name,
    )
    files = () if model.int8 is None else model.int8[1]
    _export_to(job.out / name, refined.network, card, model.role == "front" and wants_onnx(settings), files)
    return ModelRow(
        name=name,
        role=model.role,
        digest=genotype.digest,
        cost=model.cost,
        val_accuracy=val,
        test_accuracy=refined.test_accuracy,
        latency_ms=model.cost.latency / 1e6,
        path=name,
        genotype=genotype,
        int8=None if model.int8 is None else model.int8[0].row,
    )


def wants_onnx(settings: Settings) -> bool:
    """Whether the front is written as ONNX too: as asked for, or where that is installed."""
    return is_installed() if settings.output.onnx is None else settings.output.onnx


def _export_to(folder: Path, network: nn.Module, card: Card, onnx: bool, beside: Sequence[Path]) -> None:
    try:
        export(network, folder, card, onnx=onnx, beside=beside)
    except ModelError as error:
        if not onnx:
            raise
        _logger.warning("%s goes without ONNX: %s", folder.name, error)
        export(network, folder, card, beside=beside)


def _stem(model: str) -> str:
    return Path(model.partition(":")[2]).name if ":" in model else model


def _taken(folder: Path, genotype: Genotype) -> bool:
    """Whether another genotype has been exported under this name."""
    config = folder / "config.json"
    return config.is_file() and f'"{genotype.digest}"' not in config.read_text(encoding="utf-8")
