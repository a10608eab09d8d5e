"""The arguments of `python -m nas_kd.rank_check`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

from nas_kd.arguments.augment import add_augmentation
from nas_kd.arguments.choices import add_choices
from nas_kd.arguments.data import add_data, add_reading
from nas_kd.arguments.network import add_base
from nas_kd.arguments.output import add_report
from nas_kd.arguments.parsing import Parser, command_line, number
from nas_kd.arguments.parts import defaults
from nas_kd.arguments.search import add_library
from nas_kd.arguments.sharing import add_storage, add_workers, storage_of_environment
from nas_kd.arguments.study import Settings, settings_from
from nas_kd.arguments.teacher import add_teacher, add_teacher_epochs
from nas_kd.arguments.training import add_proxy_rate, add_recipe
from nas_kd.errors import NasKdError, without_password


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """The arguments of `python -m nas_kd.rank_check`: those of the `study` that it speaks of, and its own. A truth sees
    `truth_images`, a proxy `proxy_images`; a score looks at `val_images` of the validation images. Proxies begin with
    all the weights that they can, or, of `starts` "study", with those of a study alone."""

    study: Settings
    genotypes: int = 30
    band: float = 0.15
    near: int = 0
    truth_images: int = 102_400
    proxy_images: int = 4000
    val_images: int = 2000
    starts: str = "all"


def rank_parser(prog: str = "python -m nas_kd.rank_check") -> argparse.ArgumentParser:
    """The parser of the rank check."""
    parser = Parser(
        prog=prog,
        description="How far the ranking of short trainings can be trusted: trains random genotypes for long and tells "
        "how well each score would have ordered them.",
        epilog=f"example: {prog} --budget params=1M --genotypes 10 --truth-images 20000",
    )
    add_base(parser)
    add_teacher(parser)
    add_data(parser)
    add_augmentation(parser)
    add = parser.add_argument_group("check").add_argument
    add("--budget", required=True, metavar="B", help="around which costs: params=1M,macs=30M or macs=50%% of the base")
    add("--genotypes", type=number(0), metavar="N", help="random genotypes to train (%(default)s)")
    add("--band", type=number(0.001, float, 1), metavar="F", help="how far off the budget (%(default)s)")
    add("--near", type=number(0), metavar="N", help="genotypes near the optimum to train as well (%(default)s)")
    add_choices(add)
    add_library(add)
    add = parser.add_argument_group("training").add_argument
    add("--truth-images", type=number(2), metavar="N", help="images that a truth sees (%(default)s)")
    add("--proxy-images", type=number(8), metavar="N", help="images that a short training sees (%(default)s)")
    add_proxy_rate(add)
    add(
        "--starts",
        choices=("all", "study"),
        help="short trainings from fresh weights, the closed form and the library, or as in a study alone"
        " (%(default)s)",
    )
    add("--val-images", type=number(2), metavar="N", help="validation images a score looks at (%(default)s)")
    add_teacher_epochs(add)
    add_recipe(add)
    add_reading(add)
    add = parser.add_argument_group("output").add_argument
    add_report(add)
    add_storage(add)
    add_workers(parser)
    parser.take_defaults({**defaults(Settings), **defaults(RankSettings)})
    return parser


def parse_rank_check(argv: Sequence[str]) -> RankSettings:
    """Reads the arguments of the rank check. Raises NasKdError for bad ones."""
    arguments = vars(rank_parser().parse_args(argv))
    own = {field.name: arguments.pop(field.name) for field in fields(RankSettings) if field.name != "study"}
    if own["truth_images"] < 2 * own["proxy_images"]:
        raise NasKdError(
            f"--truth-images {own['truth_images']} is no truth beside --proxy-images {own['proxy_images']}: give it at "
            "least twice as many"
        )
    _check_counts(own["genotypes"], own["near"])
    command = command_line("python -m nas_kd.rank_check", [*map(without_password, argv)])
    arguments |= {"command": command, "base_bounds": False}
    arguments["storage"] = arguments["storage"] or storage_of_environment()
    return RankSettings(study=settings_from(arguments), **own)


def _check_counts(genotypes: int, near: int) -> None:
    for option, count in (("--genotypes", genotypes), ("--near", near)):
        if 0 < count < 3:
            raise NasKdError(f"{option} {count} have no order to speak of: give at least 3, or 0")
    if not genotypes and not near:
        raise NasKdError("--genotypes 0 with --near 0 leaves nothing to train: give one of them at least 3")
