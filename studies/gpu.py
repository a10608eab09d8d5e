"""A quarter of an hour on a GPU: what can only be checked and measured there, and as much of the tables as fits.

    python studies/gpu.py --cifar10 DIR --weights DIR [--minutes 12] [--part versus …]
    python studies/gpu.py --rehearse                        the same code on a CPU, tiny, handwritten digits

No network is needed. `DIR` holds CIFAR-10 as image folders (train/CLASS, test/CLASS) and the public CIFAR ResNets'
weights (`cifar10_resnet56_akamaster.safetensors`, …).

- `checks`: the tests marked `gpu`, and the main job from its first line to its report
- `throughput`: images per second against a constant batch and a loop by hand (gpu_throughput.py)
- `versus`: ResNet-56 at 1/2.57 of its MACs, ours and torch-pruning, equal images and teacher (versus.py)
- `tiny`: a study within the costs of MLPerf Tiny's ResNet-8 (78,666 params, 12.50 M MACs)
- `paper_a`: widths learnt at half of the MACs and 1/5.2 of the params of MobileNetV2 (paper_a.py)
- `paper_b`: ResNet-56 with cheap convolutions, direct, beside a teacher, online (paper_b.py)

One command after the other: once steps are recorded, four at once were no faster together (docs/results/gpu.md). What
ends within the minutes is kept: rows in `docs/results/gpu/PART.jsonl` (`--rows`), under the command that made them, and
the next quarter does what is missing. Commands that are still at work when the time is over are stopped. Logs and
models lie in `--out`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_tables import hardware

from nas_kd.files.records import Records

STUDIES = Path(__file__).resolve().parent
ROOT = STUDIES.parent
PARTS = ("checks", "throughput", "versus", "tiny", "paper_a", "paper_b")
GRACE = 20.0  # seconds that a command has to write its state once it is interrupted
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command: `words` of it, with {cifar10} and {weights} for the folders given and {out} for its own; about how
    many `seconds` it takes on a large GPU. One that is `alone` shares the device with no other: it is timed."""

    part: str
    name: str
    words: str
    seconds: float
    alone: bool = False


CIFAR = "--dataset folder --data-dir {cifar10}"
RESNET56 = "--initial-checkpoint {weights}/cifar10_resnet56_akamaster.safetensors"
RESNET20 = "--initial-checkpoint {weights}/cifar10_resnet20_akamaster.safetensors"
REAL = (
    Job(part="checks", name="tests", words="-m pytest -q -m gpu -p no:cacheprovider tests", seconds=60, alone=True),
    Job(part="checks", name="main", words="-m nas_kd.study --budget params=1M --out {out}", seconds=150, alone=True),
    Job(
        part="throughput",
        name="throughput",
        words="studies/gpu_throughput.py --out {out}/rows.jsonl",
        seconds=160,
        alone=True,
    ),
    *(
        Job(
            part=part,
            name=f"{pair} {arm}",
            words=f"studies/versus.py {pair} {CIFAR} {weights} --out {{out}} --arms {shlex.quote(arm)}",
            seconds=seconds,
        )
        for part, pair, weights, seconds, ours in (
            ("versus", "resnet56", RESNET56, 150, "knapsack, small"),
            ("tiny", "tiny", RESNET20, 100, "knapsack, widths"),
        )
        for arm in (ours, "torch-pruning local l2 inner")
    ),
    Job(part="paper_a", name="paper_a", words=f"studies/paper_a.py --quarter {CIFAR} --out {{out}}", seconds=330),
    Job(part="paper_b", name="paper_b", words=f"studies/paper_b.py --quarter {CIFAR} --out {{out}}", seconds=330),
)
DIGITS = "--budget params=100K --train-images 320 --teacher-epochs 2 --proxy-epochs 1 --refine-epochs 1"
REHEARSED = (
    Job(
        part="checks",
        name="tests",
        words="-m pytest -q -m gpu -p no:cacheprovider tests/training/test_gpu.py",
        seconds=20,
    ),
    Job(
        part="throughput",
        name="throughput",
        words="studies/gpu_throughput.py --rehearse --out {out}/rows.jsonl",
        seconds=10,
    ),
    Job(
        part="tiny",
        name="tiny",
        words=f"-m nas_kd.study --model cifar_resnet20 --img-size 16 {DIGITS} --trials 1 --front 1 --library-budget 0 "
        "--no-base-bounds -q --out {out}",
        seconds=20,
    ),
)


@dataclass
class Running:
    """A command at work."""

    job: Job
    process: subprocess.Popen[bytes]
    out: Path
    started: float


class Quarter:
    """What runs on the device until the time is over."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.end = time.monotonic() + 60 * arguments.minutes
        self.running: list[Running] = []
        arguments.rows.mkdir(parents=True, exist_ok=True)

    def run(self, jobs: Sequence[Job]) -> None:
        """Each job that is not there yet and finds the time, in their order; several at once."""
        waiting = [job for job in jobs if self.key(job) not in self.records(job)]
        while waiting or self.running:
            while waiting and self.has_room(waiting[0]):
                self.start(waiting.pop(0))
            time.sleep(0.2)
            self.collect()
            if time.monotonic() > self.end:
                self.stop()
                break
            if not self.running and waiting and self.left() < waiting[0].seconds:
                print(f"no time for {waiting.pop(0).name}", flush=True)

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def has_room(self, job: Job) -> bool:
        """Whether a command may begin beside the others."""
        if self.left() < job.seconds * self.arguments.least:
            return False
        alone = job.alone or any(running.job.alone for running in self.running)
        return not self.running if alone else len(self.running) < self.arguments.at_once

    def command(self, job: Job, out: Path | str) -> list[str]:
        places = {"cifar10": self.arguments.cifar10, "weights": self.arguments.weights, "out": out}
        return [word.format(**places) for word in shlex.split(job.words)]

    def key(self, job: Job) -> str:
        """The command without the places of this machine."""
        return re.sub(r"\{(\w+)\}", lambda found: found[1].upper(), f"python {job.words}")

    def records(self, job: Job) -> Records:
        return Records(self.arguments.rows / f"{job.part}.jsonl")

    def start(self, job: Job) -> None:
        out = (
            self.arguments.out / job.part
            if job.part in ("versus", "tiny")
            else self.arguments.out / job.name.replace(" ", "-")
        )
        out.mkdir(parents=True, exist_ok=True)
        paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": paths}  # docs/decisions.md
        with (self.arguments.out / f"{job.name.replace(' ', '-')}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *self.command(job, out)], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        self.running.append(Running(job, process, out, time.monotonic()))
        print(f"{datetime.datetime.now():%H:%M:%S} begins: {job.name}", flush=True)

    def collect(self) -> None:
        """Notes what has ended."""
        for running in [running for running in self.running if running.process.poll() is not None]:
            self.running.remove(running)
            self.note(running)

    def note(self, running: Running, cut: bool = False) -> None:
        """Writes the row of a command that ended well; what scripts had done when they were stopped counts too."""
        job, code, seconds = running.job, running.process.returncode, time.monotonic() - running.started
        print(f"{datetime.datetime.now():%H:%M:%S} ends with {code}: {job.name}, {seconds:.0f} s", flush=True)
        found = list(results(running.out, self.arguments.out / f"{job.name.replace(' ', '-')}.log"))
        if code != 0 and not (cut and found):
            return
        what = {"name": job.name, "date": str(datetime.date.today()), "hardware": hardware()}
        key = self.key(job) + (" (cut)" if cut else "")
        self.records(job)[key] = {**what, "cut": cut, "seconds": round(seconds, 1), "results": found}

    def stop(self) -> None:
        """Interrupts what is at work."""
        for running in self.running:
            running.process.send_signal(signal.SIGINT)
        for running in self.running:
            try:
                running.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            self.note(running, cut=True)
        self.running.clear()


def results(out: Path, log: Path) -> Iterator[Row]:
    """What a command left: rows of a script, models of a study, the seconds of its stages, the last line of tests."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if stages := re.findall(r"^(\w[\w ]*): done in (\d+) s", text, re.MULTILINE):
        yield {"stages": {name: int(seconds) for name, seconds in stages}}
    if (out / "front.csv").exists():
        yield from csv.DictReader((out / "front.csv").open(encoding="utf-8"))
    for path in sorted(out.glob("**/rows.jsonl")):
        yield from Records(path).values()
    lines = text.strip().splitlines()
    if lines and re.search(r"\d+ (passed|failed|skipped)", lines[-1]):
        yield {"tests": lines[-1].strip("= ")}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=12, help="of this run (12)")
    add("--part", action="append", choices=PARTS, help="only this part (repeatable; all)")
    add("--cifar10", type=Path, help="CIFAR-10 as image folders")
    add("--weights", type=Path, help="folder with the public weights of the CIFAR ResNets")
    add("--rows", type=Path, help="where rows are kept (docs/results/gpu; of a rehearsal the output folder)")
    add("--out", type=Path, default=Path("results", "gpu"), help="logs, caches and models (results/gpu)")
    add("--at-once", type=int, default=1, help="commands that share the device (1)")
    add("--least", type=float, default=0.6, help="share of its usual time that must be left for a command to begin")
    add("--rehearse", action="store_true", help="tiny, on the handwritten digits")
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or (arguments.out if arguments.rehearse else ROOT / "docs" / "results" / "gpu")
    if not arguments.rehearse and not (arguments.cifar10 and arguments.weights):
        parser.error("give --cifar10 and --weights, or --rehearse")
    return arguments


def main() -> int:
    arguments = parse()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in (REHEARSED if arguments.rehearse else REAL) if job.part in (arguments.part or PARTS)]
    quarter = Quarter(arguments)
    quarter.run(jobs)
    missing = [job.name for job in jobs if quarter.key(job) not in quarter.records(job)]
    print(f"missing: {', '.join(missing)}" if missing else "all is there", flush=True)
    return 1 if missing and arguments.rehearse else 0


if __name__ == "__main__":
    sys.exit(main())
