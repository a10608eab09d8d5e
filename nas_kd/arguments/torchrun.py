"""Commands as torchrun starts them: rank 0 runs the command, the other ranks take part in its trainings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from nas_kd.errors import NasKdError

Command = Callable[[Sequence[str]], int]
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_rank() -> bool:
    """Whether this process is one of several that torchrun started."""
    return all(name in os.environ for name in _NAMES) and os.environ["WORLD_SIZE"] != "1"


def led(command: Command) -> Command:
    """The command for every process that torchrun starts; without torchrun it is as it was."""

    def run(arguments: Sequence[str]) -> int:
        if not is_rank():
            return command(arguments)
        from nas_kd.training.loop import take_part
        from nas_kd.training.ranks import together

        with together() as ranks:
            return take_part(ranks) if ranks.rank else command(arguments)

    return run


def end(code: int) -> int:
    """The exit code of a command. A process that leaves the others in the middle of a training ends here, at once: its
    threads still hold tensors of that training, and one that lets go of them while Python tidies up may abort."""
    if code and is_rank():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # which nobody reads any more
                stream.flush()
        os._exit(code)
    return code


def refuse_jobs(jobs: int) -> None:
    """Raises NasKdError for workers beside ranks."""
    if is_rank() and jobs > 1:
        raise NasKdError(
            "torchrun shares out each training, --jobs trials and models: leave out one of them; workers may join with "
            "python -m nas_kd.worker"
        )
