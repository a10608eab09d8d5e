"""`nas-kd COMMAND …`, the same as `python -m nas_kd.COMMAND …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from nas_kd import __version__
from nas_kd.errors import nearest

COMMANDS = {
    "study": "search a family of smaller models within a budget",
    "worker": "join a running study from another machine",
    "rank_check": "tell how far the ranking of short trainings can be trusted",
    "distill": "train one small model, online with its peers or beside a teacher",
    "structure": "learn how wide each block must be, while it is distilled",
    "quantize": "write a result as int8 and measure it",
    "mcu": "run an int8 result as a microcontroller would, and compile it for an NPU",
    "space": "show what a model may become and what that costs",
    "run": "run timm's train.py, or a script of yours, on a result",
    "push": "share a result on the Hugging Face hub",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hands over to the command of the first argument and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0].replace("-", "_") if arguments else ""
    if name in COMMANDS:
        return int(importlib.import_module(f"nas_kd.{name}").main(arguments[1:]))
    lines = "\n".join(f"  {name:<11} {words}" for name, words in COMMANDS.items())
    usage = f"usage: nas-kd COMMAND …\n\ncommands (nas-kd COMMAND --help for more):\n{lines}\n"
    if arguments in (["--version"], ["-h"], ["--help"]):
        sys.stdout.write(f"nas_kd {__version__}\n" if arguments == ["--version"] else usage)
        return 0
    if arguments:
        hint = nearest(name, COMMANDS) or "; see nas-kd --help"
        usage = f"nas_kd: there is no command {arguments[0]!r}{hint}\n"
    sys.stderr.write(usage)
    return 2


if __name__ == "__main__":
    sys.exit(main())
