"""What measures latency in a study, and where it keeps what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nas_kd.arguments.study import Settings
from nas_kd.budget import LATENCY, Budget
from nas_kd.costs.latency_table import LatencyTable, Meter, store_key
from nas_kd.costs.runtimes import LatencySpec, Runtime
from nas_kd.errors import OutputError
from nas_kd.preparation.records import Records
from nas_kd.progress import Stages
from nas_kd.search.space import Space

_WHOLE = 30  # choices of blocks take about as long as the whole students of the correction


def latency_spec(settings: Settings) -> LatencySpec:
    """What the latency of a study is."""
    runtime: Runtime = "onnx" if settings.latency_runtime == "onnx" else "torch"
    return LatencySpec(
        runtime=runtime,
        device=settings.latency_device,
        batch=settings.latency_batch,
        threads=settings.latency_threads,
        command=settings.latency_command,
    )


def make_meter(settings: Settings) -> Meter:
    """A meter that keeps what it measures in the study's cache, in a file of this specification and machine."""
    spec = latency_spec(settings)
    folder = Path(settings.out or Path("results") / settings.name) / "cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error
    return Meter(spec, store=Records(folder / f"latency-{store_key(spec)}.jsonl"))


def measure_latency(space: Space[nn.Module], meter: Meter, stages: Stages | None) -> None:
    """Measures the latency of every choice of every block of a space, and shows how far that is."""
    if stages is None:
        space.measure_latency(meter)
        return
    # the base first: what cannot be measured at all is told before a stage begins
    LatencyTable(space.base, space.analysis, space.input_size, meter).whole(space.analysis.identity)
    choices = {block.name: len(block.choices) for block in space.blocks}
    with stages.stage("latencies", sum(choices.values()) + _WHOLE) as advance:

        def report(name: str) -> None:
            advance(name, choices.get(name, _WHOLE))

        space.measure_latency(meter, report)


def latency_facts(settings: Settings, budget: Budget) -> dict[str, Any]:
    """What must stay the same for the latencies of a study to be comparable; nothing without a bound on them."""
    facts = latency_spec(settings).facts() if LATENCY in budget else {}
    return {LATENCY if name == "what" else f"{LATENCY} {name}": value for name, value in facts.items()}
