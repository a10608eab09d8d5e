"""The arguments of `python -m nas_kd.structure`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nas_kd.arguments.augment import add_augmentation
from nas_kd.arguments.data import add_data, add_reading
from nas_kd.arguments.network import add_base
from nas_kd.arguments.output import add_onnx, add_report
from nas_kd.arguments.parsing import Parser, command_line, number
from nas_kd.arguments.parts import changed, defaults
from nas_kd.arguments.study import Settings, settings_from
from nas_kd.arguments.teacher import add_teacher, add_teacher_epochs
from nas_kd.arguments.training import add_baselines, add_recipe
from nas_kd.budget import KINDS, parse_budget
from nas_kd.errors import BudgetError, GenotypeError, NasKdError

LOSSES = ("kd", "dkd")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureSettings:
    """The arguments of `python -m nas_kd.structure`: those of the `study` whose base, data, budget and space it uses,
    and its own. `factors` are the user's λ_b in the order given: (pattern of block names, number)."""

    study: Settings
    learn_epochs: int | None
    factors: tuple[tuple[str, float], ...]


def structure_parser(prog: str = "python -m nas_kd.structure") -> argparse.ArgumentParser:
    """The parser of the structure command."""
    parser = Parser(
        prog=prog,
        description="Learns how wide each block must be within a budget, while the network is distilled; then narrows "
        "it, and distils what is left.",
        epilog=f"example: {prog} --budget macs=50%     (no data, network or GPU needed)",
    )
    add_base(parser)
    add_teacher(parser)
    add_data(parser)
    add_augmentation(parser)
    _add_widths(parser.add_argument_group("widths").add_argument)
    _add_training(parser)
    output = parser.add_argument_group("output").add_argument
    add_report(output)
    add_baselines(output)
    add_onnx(output)
    parser.take_defaults({**defaults(Settings), "space": "width", "search_stages": False})
    return parser


def _add_widths(add: Callable[..., object]) -> None:
    add(
        "--budget",
        required=True,
        metavar="B",
        help="hard upper bounds on params, MACs or both: macs=50%% of the base, params=1M,macs=30M",
    )
    add(
        "--lambda",
        dest="factors",
        action="append",
        default=[],
        metavar="P",
        help="weigh what blocks cost: 'layer2.*=2.0' makes them narrower, 0.5 wider, 0 spares them (repeatable; 1)",
    )
    add("--space", metavar="S", help="which widths are open: width=0.25/0.5/1 (all)")
    add(
        "--pin",
        action="append",
        default=[],
        metavar="P",
        help="fix or bound blocks: 'layer1.*:width=1', 'layer4.0:width=0.5/0.75' (repeatable)",
    )
    add("--search-stages", action="store_true", help="each stage's residual stream gets a width as well")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--learn-epochs", type=number(1), metavar="N", help="epochs in which widths are learnt (half as many as then)")
    add("--refine-epochs", type=number(1), metavar="N", help="epochs of the narrow network (by the data's size)")
    add("--distill", choices=LOSSES, help="logit KD or decoupled KD from the teacher (%(default)s)")
    add_teacher_epochs(add)
    add_recipe(add)
    add_reading(add)


def parse_structure(argv: Sequence[str]) -> StructureSettings:
    """Reads the arguments of the structure command. Raises NasKdError for bad ones."""
    arguments = vars(structure_parser().parse_args(argv))
    if others := [kind for kind in parse_budget(arguments["budget"]) if kind not in KINDS]:
        raise BudgetError(
            f"structure learning bounds {' or '.join(KINDS)}, not {others[0]}: python -m nas_kd.study bounds that too"
        )
    _check_widths_alone(arguments["space"], arguments["pin"])
    own: dict[str, Any] = {
        "learn_epochs": arguments.pop("learn_epochs"),
        "factors": tuple(map(_factor, arguments.pop("factors"))),
    }
    command = command_line("python -m nas_kd.structure", argv)
    study = settings_from({**arguments, "command": command, "library_budget": 0.0, "base_bounds": False})
    if study.output.out is None:
        study = changed(study, out=f"results/structure-{study.name}")
    return StructureSettings(study=study, **own)


def _check_widths_alone(space: str, pins: Sequence[str]) -> None:
    """Raises GenotypeError for an open dimension that is not learnt here."""
    parts = [part.partition("=")[0].strip() for part in space.split(",") if part.strip()]
    for name in (*parts, *(pin.rpartition(":")[2].partition("=")[0].strip() for pin in pins)):
        if name != "width":
            raise GenotypeError(
                f"structure learning learns widths, not {name!r}: use --space width=… and --pin BLOCK:width=… "
                "(python -m nas_kd.study searches the rest)"
            )


def _factor(text: str) -> tuple[str, float]:
    pattern, equals, value = text.rpartition("=")
    try:
        factor = float(value)
    except ValueError:
        factor = math.nan
    if not (equals and pattern) or math.isnan(factor):
        raise NasKdError(f"cannot read --lambda {text!r}: write it like 'layer2.*=2.0'")
    if not 0 <= factor < math.inf:
        raise NasKdError(f"--lambda {text!r}: a factor must be 0 or more (0 spares the blocks, 2 weighs them twice)")
    return pattern, factor
