"""What the library costs the main job: CPU-seconds of a whole study with it and without.

    python studies/library_time.py [ARGUMENTS of nas_kd.study …] > docs/results/library_time.md

Each study runs once in a process of its own and an empty folder; CPU-seconds, so that other work on the same cores
changes little.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

DEFAULT = ("--budget", "params=1M")
WITHOUT = ("--library-budget", "0")


def cpu_seconds(arguments: Sequence[str], out: Path) -> float:
    """Of one study and of all processes that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "nas_kd.study", *arguments, "--quiet", "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def main() -> None:
    arguments = tuple(sys.argv[1:]) or DEFAULT
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, more in (("with the library", ()), ("without", WITHOUT)):
            out = Path(folder) / name.split()[0]
            found[name] = cpu_seconds([*arguments, *more], out)
            print(json.dumps({name: found[name]}), file=sys.stderr)
    first, second = found.values()
    print("# What the library costs the main job\n")
    print(
        f"`python -m nas_kd.study {' '.join(arguments)}`, and the same with `{' '.join(WITHOUT)}`; seed 0, once each.\n"
    )
    print(
        f"torch {torch.__version__}; python {platform.python_version()}; {platform.machine()}, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads of a shared machine; {datetime.date.today()}.\n"
    )
    print("| | CPU-seconds |\n|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.0f} |")
    print(f"\nWith it: {first / second:.2f} times the CPU-seconds without.")


if __name__ == "__main__":
    main()
