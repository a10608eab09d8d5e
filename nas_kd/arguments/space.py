"""The arguments of `python -m nas_kd.space`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from nas_kd.arguments.parsing import Parser, number
from nas_kd.arguments.shared import add_choices
from nas_kd.budget import parse_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceSettings:
    """The arguments of `python -m nas_kd.space`."""

    model: str
    reduction: int | None
    img_size: int | None
    in_chans: int
    num_classes: int | None
    space: str
    search_stages: bool
    pin: tuple[str, ...]
    budget: str | None
    as_json: bool


def parse_space(argv: Sequence[str]) -> SpaceSettings:
    """Reads the arguments of the space command. Raises NasKdError for bad ones."""
    parser = Parser(
        prog="python -m nas_kd.space",
        description="What a timm CNN may become: its blocks, the choices open to each, and what they cost.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm model, or local-dir:FOLDER")
    add("--img-size", type=number(4), metavar="N", help="side of the images in pixels (the model's)")
    add("--reduction", type=number(1), metavar="R", help="total stride of the network; small images need 8 or 4")
    add("--in-chans", type=int, choices=(1, 3), default=3, help="channels of the images (3)")
    add("--num-classes", type=number(1), metavar="N", help="outputs (the model's)")
    add_choices(add)
    add("--budget", metavar="B", help="tell whether it can be met: params=1M,macs=30M or macs=50%% of the base")
    add("--json", action="store_true", dest="as_json", help="print one JSON object")
    add("--debug", action="store_true", help="tracebacks")
    arguments = vars(parser.parse_args(argv))
    if arguments["budget"]:
        parse_budget(arguments["budget"])
    arguments["pin"] = tuple(arguments["pin"])
    return SpaceSettings(**{field.name: arguments[field.name] for field in fields(SpaceSettings)})
