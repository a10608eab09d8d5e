"""A look at a search space before a minute is spent on it: `python -m nas_kd.space MODEL`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nas_kd.arguments.choices import ChoicesSettings, add_choices
from nas_kd.arguments.network import NetworkSettings
from nas_kd.arguments.parsing import Parser, guarded, model_name, number
from nas_kd.arguments.parts import defaults, part, read
from nas_kd.arguments.search import add_accelerator
from nas_kd.budget import ACCELERATOR, CYCLES, DEVICE, KINDS, Budget, parse_budget, short
from nas_kd.errors import BudgetError, ModelError

if TYPE_CHECKING:
    from rich.table import Table

    from nas_kd.search.prices import BlockPrices
    from nas_kd.search.space import Space

_DRAWS = 100_000  # random genotypes by which the share within a budget is estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceSettings:
    """What the command is asked for."""

    network: NetworkSettings = part(NetworkSettings)
    choices: ChoicesSettings = part(ChoicesSettings)
    num_classes: int | None = None
    budget: str | None = None
    accelerator: str = ACCELERATOR
    as_json: bool = False


def parse_space(argv: Sequence[str]) -> SpaceSettings:
    """Reads the arguments of the space command. Raises NasKdError for bad ones."""
    parser = Parser(
        prog="python -m nas_kd.space",
        description="What a timm CNN may become: its blocks, the choices open to each, and what they cost.",
    )
    add = parser.add_argument
    add("model", type=model_name, metavar="MODEL", help="a timm model, or the folder of an exported one")
    add("--img-size", type=number(4), metavar="N", help="side of the images in pixels (the model's)")
    add("--reduction", type=number(1), metavar="R", help="total stride of the network; small images need 8 or 4")
    add("--in-chans", type=int, choices=(1, 3), help="channels of the images (3)")
    add("--num-classes", type=number(1), metavar="N", help="outputs (the model's)")
    add_choices(add)
    add("--budget", metavar="B", help="tell whether it can be met: params=1M,macs=30M or macs=50%% of the base")
    add_accelerator(add)
    add("--json", action="store_true", dest="as_json", help="print one JSON object")
    add("--debug", action="store_true", help="tracebacks")
    parser.take_defaults(defaults(SpaceSettings))
    arguments = vars(parser.parse_args(argv))
    if arguments["budget"]:
        parse_budget(arguments["budget"])
    arguments["pin"] = tuple(arguments["pin"])
    return read(SpaceSettings, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a base's blocks, choices and costs, and returns the exit code: 0, or 2 for a mistake of the user's."""
    return guarded(lambda arguments: show_space(parse_space(arguments)), argv)


def show_space(settings: SpaceSettings) -> int:
    """Analyses the base and prints what was found. Raises a NasKdError when that cannot be done."""
    import nas_kd.models  # noqa: F401  registers our networks with timm
    from nas_kd.analysis.stride_reduction import reduce_stride
    from nas_kd.networks.hub import create_base
    from nas_kd.networks.micro import Estimator
    from nas_kd.preparation.opening import options_of
    from nas_kd.search.prices import block_prices
    from nas_kd.search.space import Space

    given = {} if settings.num_classes is None else {"num_classes": settings.num_classes}
    network = settings.network
    channels = network.in_chans or 3
    base = create_base(network.model, in_chans=channels, **given)
    if network.reduction is not None:
        reduce_stride(base, network.reduction, channels)
    space = Space(base, img_size=network.img_size, options=options_of(settings.choices), name=network.model)
    try:
        space = space.with_costs(space.costs.with_device())
    except ModelError:  # they are left out, unless somebody asks for them
        if settings.budget and set(DEVICE) & set(parse_budget(settings.budget)):
            raise
    if settings.budget and CYCLES in parse_budget(settings.budget):
        space = space.with_costs(space.costs.with_cycles(Estimator(settings.accelerator)))
    budget = parse_budget(settings.budget, space.table.base()) if settings.budget else None
    facts = describe(space, block_prices(space.table, space.analysis, base), budget)
    if settings.as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        _print(space, facts)
    return 0


def describe(space: Space[Any], prices: Sequence[BlockPrices], budget: Budget | None) -> dict[str, Any]:
    """Everything about a space as plain JSON values."""
    base = space.table.base()
    facts: dict[str, Any] = {
        "model": space.analysis.name,
        "input_size": list(space.input_size),
        "blocks": [price.to_json() for price in prices],
        "genotypes": math.prod(len(block.choices) for block in space.blocks),
        "left_alone": [{"module": module, "reason": reason} for module, reason in space.analysis.left_alone],
    }
    if space.costs.cycles is not None and space.costs.cycles.estimator is not None:
        facts["accelerator"] = space.costs.cycles.estimator.accelerator
    for kind in space.table.kinds:
        facts[kind] = base[kind]
        facts[f"min_{kind}"] = space.table.cost(space.table.cheapest(kind))[kind]
    if budget is not None:
        facts["budget"] = _budget_facts(space, budget, facts)
    return facts


def _budget_facts(space: Space[Any], budget: Budget, facts: dict[str, Any]) -> dict[str, Any]:
    from nas_kd.search.feasibility import check_feasible
    from nas_kd.search.prices import share_within

    try:
        check_feasible(space.costs, space.options, budget)
        problem = ""
    except BudgetError as error:
        problem = str(error)
    bounds = {kind: {"bound": bound, "can_be_met": facts[f"min_{kind}"] <= bound} for kind, bound in budget.items()}
    return {"bounds": bounds, "problem": problem, "share_of_random": share_within(space.table, budget, _DRAWS)}


def _print(space: Space[Any], facts: dict[str, Any]) -> None:
    from nas_kd.progress import console_for

    console = console_for(sys.stdout)
    console.print(_table(facts), crop=False)
    size = "×".join(map(str, space.input_size))
    lines = [f"{facts['model']} at {size}: {short(facts['params'])} params, {short(facts['macs'])} MACs"]
    lines.append("smallest reachable: " + ", ".join(f"{short(facts[f'min_{kind}'])} {kind}" for kind in KINDS))
    lines.append(
        f"{short(facts['size'])} bytes of weights, {short(facts['peak_memory'])} bytes of activations at once; "
        f"smallest reachable: {short(facts['min_size'])} and {short(facts['min_peak_memory'])}"
    )
    if "ram" in facts:
        lines.append(
            f"in int8 on a device: {short(facts['flash'])} bytes of flash, {short(facts['ram'])} bytes of RAM; "
            f"smallest reachable: {short(facts['min_flash'])} and {short(facts['min_ram'])}"
        )
    if CYCLES in facts:
        least = short(facts[f"min_{CYCLES}"])
        lines.append(f"{short(facts[CYCLES])} cycles of {facts['accelerator']}; smallest reachable: about {least}")
    lines.append(f"genotypes: {facts['genotypes']:.3g}")
    lines += [f"left alone: {item['module']}, {item['reason']}" for item in facts["left_alone"]]
    if "budget" in facts:
        lines += _budget_lines(facts["budget"])
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _budget_lines(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"budget {kind}={short(item['bound'])}: {'can be met' if item['can_be_met'] else 'cannot be met'}"
        for kind, item in facts["bounds"].items()
    ]
    if facts["problem"]:
        return [*lines, facts["problem"]]
    share = facts["share_of_random"]
    return [
        *lines,
        f"random genotypes within it: {share:.2%}" if share else f"random genotypes within it: < 1 in {_DRAWS:,}",
    ]


def _table(facts: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("block", "kind"):
        table.add_column(heading, no_wrap=True)
    table.add_column("width", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    table.add_column("conv", no_wrap=True)
    for heading in ("params", "can save", "can add", "MACs", "can save", "can add"):
        table.add_column(heading, justify="right", no_wrap=True)
    for block in facts["blocks"]:
        choices = [" ".join(map(str, block[name])) or "-" for name in ("width", "kernel", "conv")]
        amounts = [short(block[kind][end]) for kind in KINDS for end in ("now", "saves", "adds")]
        table.add_row(block["name"], block["kind"], *choices, *amounts)
    return table


if __name__ == "__main__":
    sys.exit(main())
