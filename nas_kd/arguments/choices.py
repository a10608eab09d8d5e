"""What a base may become: the arguments, and the value that holds them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from nas_kd.arguments.parsing import number


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicesSettings:
    """The choices that are open to each block, as `nas_kd.search.options.parse_options` reads them."""

    space: str = "width,kernel,conv=fast,keep"
    search_stages: bool = True
    pin: tuple[str, ...] = ()
    channel_multiple: int = 8


def add_choices(add: Callable[..., object]) -> None:
    """The arguments that say what a base may become."""
    add(
        "--space",
        metavar="S",
        help="what may change: width,kernel,conv,keep, with values as in conv=standard/depthwise; conv=fast: the kinds"
        f" that save time; keep: blocks may go ({ChoicesSettings().space})",
    )
    add(
        "--search-stages",
        action=argparse.BooleanOptionalAction,
        help="each stage's residual stream gets a width as well (yes)",
    )
    add("--pin", action="append", default=[], metavar="P", help="limit blocks: 'layer1.*:conv=standard' (repeatable)")
    add(
        "--channel-multiple",
        type=number(1),
        metavar="N",
        help="what stays of many channels is a multiple of it, as runtimes and accelerators like it (%(default)s)",
    )
