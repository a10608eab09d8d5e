"""What the library costs the main job: CPU-seconds of a whole study with it and without.

    python studies/library_time.py [--seeds 0 1 2] [ARGUMENTS of nas_kd.study …] > docs/results/library_time.md

For each seed the two studies run side by side, each in a process and an empty folder of its own and on one thread, so
that other work on the same cores slows both alike. CPU-seconds are theirs and those of all processes that they start.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

DEFAULT = ("--budget", "params=1M")
WITHOUT = ("--library-budget", "0")
ARMS = {"with": (), "without": WITHOUT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One study: CPU-seconds, the front models that came out, and the best test accuracy (fraction) among them."""

    seconds: float
    front: int
    accuracy: float


def run_study(arguments: Sequence[str], out: Path) -> Run:
    """Runs one study. Raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", "nas_kd.study", *arguments, "--quiet", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)  # the usage of this child alone: others run beside it
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    with (out / "front.csv").open(encoding="utf-8", newline="") as file:
        front = [row for row in csv.DictReader(file) if row["role"] == "front"]
    best = max(float(row["test_accuracy"]) for row in front)
    return Run(seconds=usage.ru_utime + usage.ru_stime, front=len(front), accuracy=best)


def run_pair(arguments: Sequence[str], seed: int) -> dict[str, Run]:
    """The studies of one seed, at the same time."""
    found: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, more: Sequence[str]) -> None:
            found[name] = run_study([*arguments, "--seed", str(seed), *more], Path(folder, name))

        threads = [threading.Thread(target=run, args=arm) for arm in ARMS.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if len(found) < len(ARMS):
        sys.exit("a study failed: its message is above")
    return found


def page(arguments: Sequence[str], pairs: dict[int, dict[str, Run]]) -> str:
    """The results as Markdown."""
    ratios = [pair["with"].seconds / pair["without"].seconds for pair in pairs.values()]
    spread = f" ± {stdev(ratios):.2f}" if len(ratios) > 1 else ""
    rows = [
        f"| {seed} | {name} | {run.seconds:.0f} | {run.front} | {100 * run.accuracy:.1f} |"
        for seed, pair in pairs.items()
        for name, run in pair.items()
    ]
    head = [
        "# What the library costs the main job",
        "",
        f"`python -m nas_kd.study {' '.join(arguments)}`, and the same with `{' '.join(WITHOUT)}`, side by side.",
        "",
        f"torch {torch.__version__}; python {platform.python_version()}; {platform.machine()}, one thread each; "
        f"{datetime.date.today()}.",
        "",
        "| seed | library | CPU-seconds | front models | best of them, test % |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(
        [*head, *rows, "", f"With it: {mean(ratios):.2f}{spread} times the CPU-seconds without (mean of the ratios)."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    own, others = parser.parse_known_args()
    arguments, pairs = others or list(DEFAULT), {}
    for seed in own.seeds:
        pairs[seed] = run_pair(arguments, seed)
        print(json.dumps({name: run.seconds for name, run in pairs[seed].items()}), file=sys.stderr)
    print(page(arguments, pairs))


if __name__ == "__main__":
    main()
