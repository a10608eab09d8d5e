"""What estimates cycles in a study, and where it keeps its estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from torch import nn

from nas_kd.arguments.study import Settings
from nas_kd.budget import CYCLES, Budget
from nas_kd.costs.cost_model import CostModel
from nas_kd.costs.cycle_table import STUDENTS, cycles_key
from nas_kd.files.records import Records
from nas_kd.networks.micro import Estimator
from nas_kd.networks.tflite_file import has_tools, need_tools
from nas_kd.preparation.latency import cache_folder
from nas_kd.progress import Stages
from nas_kd.search.space import Space

_NOTE = "nas_kd cycles"  # the study's user attribute


def with_cycles(
    costs: CostModel, settings: Settings, stages: Stages | None, begun: Mapping[str, Any] | None
) -> CostModel:
    """Costs with cycles: those of some students are estimated, which `stages` show, or what the study with these user
    attributes notes is taken over: where no compiler is installed that is all there is.

    Raises NasKdError where it is not installed and nothing is noted, ModelError for a base that devices do not get.
    """
    told: Mapping[str, Any] | None = (begun or {}).get(_NOTE)
    if told is not None and not has_tools():
        return costs.with_told_cycles(told, None)
    need_tools()
    estimator = Estimator(settings.search.accelerator)
    key = cycles_key(estimator, costs.base, costs.analysis.input_size)
    store = Records(cache_folder(settings) / f"cycles-{key}.jsonl")
    if told is not None:
        return costs.with_told_cycles(told, estimator, store)
    if stages is None:
        return costs.with_cycles(estimator, store)
    with stages.stage("cycles", STUDENTS) as advance:
        return costs.with_cycles(estimator, store, lambda name: advance(name))


def cycle_facts(settings: Settings, budget: Budget) -> dict[str, Any]:
    """What must stay the same for the cycles of a study to be comparable."""
    return {CYCLES: settings.search.accelerator} if CYCLES in budget else {}


def note_cycles(study: optuna.Study, space: Space[nn.Module]) -> None:
    """Notes on a study that is bounded by cycles what is expected, for workers."""
    if space.costs.cycles is not None and _NOTE not in study.user_attrs:
        study.set_user_attr(_NOTE, space.costs.cycles.notes())
