"""What measures latency in a study, and where it keeps what it measured."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

from torch import nn

from nas_kd.arguments.study import Settings
from nas_kd.budget import LATENCY, Budget
from nas_kd.costs.latency_table import STUDENTS, Meter, store_key
from nas_kd.costs.runtimes import LatencySpec, Runtime, default_runtime
from nas_kd.errors import OutputError
from nas_kd.preparation.records import Records
from nas_kd.progress import Stages
from nas_kd.search.space import Space

_logger = logging.getLogger(__name__)


def latency_spec(settings: Settings) -> LatencySpec:
    """What the latency of a study is: of ONNX Runtime, if nothing else is asked for and that is there."""
    named = {runtime: runtime for runtime in get_args(Runtime)}
    runtime: Runtime = named.get(settings.latency_runtime) or default_runtime(settings.latency_device)[0]
    return LatencySpec(
        runtime=runtime,
        device=settings.latency_device,
        batch=settings.latency_batch,
        threads=settings.latency_threads,
        command=settings.latency_command,
        limit_s=settings.latency_timeout,
    )


def tell_runtime(settings: Settings) -> None:
    """Warns when latency is measured in torch for want of ONNX Runtime."""
    reason = default_runtime(settings.latency_device)[1]
    if reason and settings.latency_runtime is None and not settings.latency_command:
        _logger.warning("latency is measured in torch, which few deploy: %s", reason)


def make_meter(settings: Settings) -> Meter:
    """A meter that keeps what it measures in the study's cache, in a file of this specification and machine."""
    spec = latency_spec(settings)
    tell_runtime(settings)
    folder = Path(settings.out or Path("results") / settings.name) / "cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error
    return Meter(spec, store=Records(folder / f"latency-{store_key(spec)}.jsonl"))


def measure_latency(space: Space[nn.Module], meter: Meter, stages: Stages | None) -> None:
    """Measures what the latencies of a space are expected from, and shows how far that is."""
    if stages is None:
        space.measure_latency(meter)
        return
    with stages.stage("latencies", 1 + STUDENTS) as advance:
        space.measure_latency(meter, lambda name: advance(name))


def latency_facts(settings: Settings, budget: Budget) -> dict[str, Any]:
    """What must stay the same for the latencies of a study to be comparable; nothing without a bound on them."""
    facts = latency_spec(settings).facts() if LATENCY in budget else {}
    return {LATENCY if name == "what" else f"{LATENCY} {name}": value for name, value in facts.items()}
