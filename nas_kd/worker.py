"""Joins a running study from any machine: `python -m nas_kd.worker --storage URL --study-name NAME`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence

from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.worker import WorkerSettings, parse_worker


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a worker and returns the exit code: 0 the study has what it wants, 2 a mistake, 130 interrupted."""
    return guarded(lambda arguments: run_worker(parse_worker(arguments)), argv)


def run_worker(settings: WorkerSettings) -> int:
    """Trains trials until the study has what it wants."""
    from nas_kd.progress import Stages, configure, console_for

    console = console_for(sys.stderr)
    configure(console, quiet=settings.quiet, debug=settings.debug)
    if settings.leash:
        threading.Thread(target=_follow_parent, daemon=True).start()

    from nas_kd.workers.joining import join

    trials = join(settings, Stages(console, quiet=settings.quiet))
    if not settings.quiet:
        console_for(sys.stdout).print(f"the study has what it wants; {trials} of its trials were this worker's")
    return 0


def _follow_parent() -> None:
    """Ends this worker as a cluster would when its parent is gone, however that ended: the pipe between them closes."""
    while os.read(0, 1):  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
