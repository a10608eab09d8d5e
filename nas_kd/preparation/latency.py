"""What measures latency in a study, and where it keeps what it measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import optuna
from torch import nn

from nas_kd.arguments.latency import LatencySettings
from nas_kd.arguments.study import Settings
from nas_kd.budget import LATENCY, Budget
from nas_kd.costs.cost_model import CostModel
from nas_kd.costs.latency_table import STUDENTS, Meter, latencies_key
from nas_kd.costs.runtimes import LatencySpec, Runtime, default_runtime
from nas_kd.errors import OutputError, StudyError
from nas_kd.files.records import Records
from nas_kd.progress import Stages
from nas_kd.search.space import Space

_NOTE = "nas_kd latency"  # the study's user attribute
_logger = logging.getLogger(__name__)


def latency_spec(latency: LatencySettings) -> LatencySpec:
    """What the latency of a study is: of ONNX Runtime, if nothing else is asked for and that is there."""
    named = {runtime: runtime for runtime in get_args(Runtime)}
    runtime: Runtime = named.get(latency.runtime) or default_runtime(latency.device)[0]
    return LatencySpec(
        runtime=runtime,
        device=latency.device,
        batch=latency.batch,
        threads=latency.threads,
        command=latency.command,
        limit_s=latency.timeout,
    )


def tell_runtime(latency: LatencySettings) -> None:
    """Warns when latency is measured in torch for want of ONNX Runtime."""
    reason = default_runtime(latency.device)[1]
    if reason and latency.runtime is None and not latency.command:
        _logger.warning("latency is measured in torch, which few deploy: %s", reason)


def make_meter(settings: Settings) -> Meter:
    """A meter that keeps what it measures in the study's cache, in a file of this specification and machine."""
    spec = latency_spec(settings.latency)
    tell_runtime(settings.latency)
    return Meter(spec, store=Records(cache_folder(settings) / f"latency-{latencies_key(spec)}.jsonl"))


def cache_folder(settings: Settings) -> Path:
    """Where a study keeps what it measured, made where it is not there. Raises OutputError when it cannot be."""
    folder = Path(settings.output.out or Path("results") / settings.name) / "cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error
    return folder


def with_latency(costs: CostModel, meter: Meter, stages: Stages | None) -> CostModel:
    """Costs with latencies: measures what these are expected from, and shows how far that is."""
    if stages is None:
        return costs.with_latency(meter)
    # the base first: what cannot be measured at all is told before a stage begins
    costs.latencies(meter).whole(costs.analysis.identity)
    with stages.stage("latencies", 1 + STUDENTS) as advance:
        return costs.with_latency(meter, lambda name: advance(name))


def latency_facts(latency: LatencySettings, budget: Budget) -> dict[str, Any]:
    """What must stay the same for the latencies of a study to be comparable; nothing without a wish for them: where the
    base's is the bound, other machines are told (`note_latency`)."""
    facts = latency_spec(latency).facts() if LATENCY in budget and LATENCY not in budget.fixed else {}
    return {LATENCY if name == "what" else f"{LATENCY} {name}": value for name, value in facts.items()}


def note_latency(study: optuna.Study, latency: LatencySettings, space: Space[nn.Module]) -> None:
    """Notes on a study that is bounded by its base's latency what was measured, for other machines. Raises StudyError
    where another machine noted something else in the meantime."""
    known = space.costs.latency
    if known is None or space.budget is None or LATENCY not in space.budget.fixed:
        return
    facts = latency_spec(latency).facts()
    if _NOTE not in study.user_attrs:
        study.set_user_attr(_NOTE, {"facts": facts, **known.notes()})
    elif study.user_attrs[_NOTE]["facts"] != facts and not known.is_told:
        raise StudyError(f"another machine began the study {study.study_name!r} just now: run this command again")


def told_latency(attributes: Mapping[str, Any] | None, latency: LatencySettings) -> Mapping[str, Any] | None:
    """What the machine that began a study noted of latencies; None where that was this one, or nothing was noted."""
    noted: Mapping[str, Any] | None = (attributes or {}).get(_NOTE)
    return None if noted is None or noted["facts"] == latency_spec(latency).facts() else noted
