"""The space of a study: what its base may become, within bounds that it is asked for or that the base has."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nas_kd.analysis.structure import ROUND_TO
from nas_kd.arguments.choices import ChoicesSettings
from nas_kd.arguments.parts import changed
from nas_kd.arguments.study import Settings
from nas_kd.budget import CYCLES, DEVICE, KINDS, LATENCY, Cost, parse_budget, parse_levels
from nas_kd.costs.cost_model import CostModel
from nas_kd.costs.cost_table import CostTable
from nas_kd.errors import GenotypeError, ModelError, OutputError
from nas_kd.genotype import Genotype
from nas_kd.networks.tflite_file import has_interpreter
from nas_kd.preparation.cycles import with_cycles
from nas_kd.preparation.image_form import img_size_of
from nas_kd.preparation.latency import make_meter, told_latency, with_latency
from nas_kd.progress import Stages
from nas_kd.search.options import Options, parse_options
from nas_kd.search.space import Space
from nas_kd.search.storage import CONFIG

BASE_BOUNDS = (*KINDS, "peak_memory", LATENCY)  # that a student is not to have more of than its base, by default
_STAGES, _BASE_BOUNDS = "search stages", "base bounds"  # as a study notes them
_logger = logging.getLogger(__name__)


def make_space(settings: Settings, base: nn.Module, begun: Mapping[str, Any] | None = None) -> Space[nn.Module]:
    """What the base may become within the budget. Raises as `Space` does; `begun` is as in `bound_space`."""
    return bound_space(open_space(settings, base), settings, begun=begun)


def options_of(choices: ChoicesSettings) -> Options:
    """The choices that are open to each block, as they are asked for."""
    return parse_options(
        choices.space,
        choices.pin,
        search_stages=choices.search_stages,
        channel_multiple=choices.channel_multiple,
    )


def open_space(settings: Settings, base: nn.Module) -> Space[nn.Module]:
    """What the base may become, without bounds."""
    return Space(
        base,
        img_size=img_size_of(settings.network, settings.data),
        options=options_of(settings.choices),
        name=settings.network.model,
    )


def bound_space(
    space: Space[nn.Module],
    settings: Settings,
    stages: Stages | None = None,
    begun: Mapping[str, Any] | None = None,
) -> Space[nn.Module]:
    """A space within the bounds that are asked for, and what these leave out within the base's own; latencies and
    cycles are measured for it, which `stages` show. `begun` are the user attributes of the study that goes on: what
    another machine measured is there."""
    given = parse_budget(settings.search.budget)
    costs = _with_device(space.costs, settings, is_bounded=bool(set(DEVICE) & set(given)))
    if CYCLES in given:
        costs = with_cycles(costs, settings, stages, begun)
    own = [kind for kind in BASE_BOUNDS if settings.search.base_bounds and kind not in given]
    if LATENCY in own and (told := told_latency(begun, settings.latency)):
        costs = costs.with_told_latency(make_meter(settings), told)
    elif LATENCY in (*given, *own):
        try:
            costs = with_latency(costs, make_meter(settings), stages)
        except ModelError as error:
            if LATENCY in given:
                raise
            own.remove(LATENCY)
            _logger.warning("latency is not bounded by the base's: %s", error)
    base = costs.base_cost()
    budget = parse_budget(settings.search.budget, base).no_worse_than(_just_below(base, costs.table, own), own)
    return space.with_costs(costs).with_budget(budget).with_levels(parse_levels(settings.search.levels))


def _just_below(base: Cost, table: CostTable, kinds: Sequence[str]) -> Cost:
    """What is less than the base in each of `kinds` that is counted, where anything is."""
    counted = [kind for kind in kinds if kind != LATENCY and table.cost(table.cheapest(kind))[kind] < base[kind]]
    return dataclasses.replace(base, **{kind: base[kind] - 1 for kind in counted})


def _with_device(costs: CostModel, settings: Settings, *, is_bounded: bool) -> CostModel:
    """Costs with flash and ram where they are bounded, and where int8 is asked for if the base has them."""
    if not is_bounded and not settings.output.int8:
        return costs
    if is_bounded and not has_interpreter():
        _logger.warning("flash and ram are those of the closed form: pip install 'nas-kd[mcu]' to have them measured")
    try:
        return costs.with_device()
    except ModelError as error:
        if is_bounded:
            raise
        _logger.info("flash and ram are not counted: %s", error)
        return costs


def as_begun(settings: Settings, begun: Mapping[str, Any] | None) -> Settings:
    """The settings with what they leave open of the space as the study with these user attributes began."""
    if begun is None:
        return settings
    config = begun[CONFIG]
    noted = {
        "space": config.get("space", settings.choices.space),
        "search_stages": config.get(_STAGES, False),
        "base_bounds": config.get(_BASE_BOUNDS, False),
    }
    return changed(settings, **{name: own for name, own in noted.items() if name in settings.left_open})


def read_start(path: Path, space: Space[nn.Module]) -> Genotype:
    """The genotype in a file: in `structure.json` under "genotype", or alone.

    Raises OutputError when the file cannot be read, GenotypeError when it holds none of this space.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot read --start-from {path}: {reason}; give a structure.json") from error
    try:
        data = json.loads(text)
        given = Genotype.from_json(json.dumps(data.get("genotype", data) if isinstance(data, dict) else data))
        # of a space in which fewer blocks are open, the others are as in the base
        genotype = Genotype.of({**space.analysis.identity, **given} if given else {})
        space.analysis.check(genotype)
    except (ValueError, GenotypeError) as error:
        raise GenotypeError(f"--start-from {path} holds no genotype of this space: {error}") from error
    return genotype


def space_of(choices: ChoicesSettings) -> dict[str, Any]:
    """The arguments that say what a base may become."""
    stages = {_STAGES: True} if choices.search_stages else {}
    multiple = {} if choices.channel_multiple == ROUND_TO else {"channel multiple": choices.channel_multiple}
    return {"space": choices.space, "pin": list(choices.pin), **stages, **multiple}


def bounds_of(settings: Settings) -> dict[str, Any]:
    """Whether students are bounded by what the base has, as a study notes it."""
    return {_BASE_BOUNDS: True} if settings.search.base_bounds else {}
