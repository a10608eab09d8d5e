"""Workers beside each other: trials per second of two and of one, and eight at one PostgreSQL server.

    python studies/workers_speed.py > docs/results/workers.md
    python studies/workers_speed.py --parts postgresql            # on a machine that is too busy for the first part

Speed: the same study with one and with two workers, a thread each; counted are the trials that finish while all
workers train, so that starting processes takes no part. It is left out while anything else runs on the machine.

Eight workers: trials of a fraction of a second in a space so small that workers often propose the same genotype. None
may be trained twice, none may be left, and neither workers nor the server may complain.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import optuna
import servers
import torch
from optuna.trial import FrozenTrial, TrialState

from nas_kd.search.claims import REUSED, is_trained
from nas_kd.search.storage import close_storage, open_storage, sqlite_url
from nas_kd.search.workers import WORKER

NAME, IDLE = "workers", 0.5  # load average under which a machine is idle
SHARED = "--model test_resnet --refine-epochs 1 --front 1 --library-budget 0 --sampler random"
# a trial of some seconds; one epoch has no rung at which some would stop early
SPEED = "--img-size 64 --teacher-epochs 1 --proxy-epochs 1 --budget params=60%"
# 32 genotypes, of which the study wants 24
SMALL = "--img-size 32 --train-images 120 --teacher-epochs 1 --proxy-epochs 2 --budget params=100% --space width=1/0.5"


def study(out: Path, url: str, arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the study's command to its end, a thread for each worker."""
    command = [*SHARED.split(), *arguments.split(), "--study-name", NAME, "--out", str(out), "--storage", url]
    return subprocess.run(
        [sys.executable, "-m", "nas_kd.study", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def trials_of(url: str) -> list[FrozenTrial]:
    storage = open_storage(url)
    try:
        return optuna.load_study(study_name=NAME, storage=storage).get_trials()
    finally:
        close_storage(storage)


def rate(trials: list[FrozenTrial]) -> tuple[float, int]:
    """Trained trials per second, and how many, between the last worker's first start and the first one's last end."""
    trained = sorted((t for t in trials if is_trained(t)), key=lambda trial: str(trial.user_attrs[WORKER]))
    workers = [list(own) for _, own in itertools.groupby(trained, key=lambda trial: str(trial.user_attrs[WORKER]))]
    start = max(min(t.datetime_start.timestamp() for t in own if t.datetime_start) for own in workers)
    end = min(max(t.datetime_complete.timestamp() for t in own if t.datetime_complete) for own in workers)
    inside = 0.0
    for trial in trained:  # those that reach over an edge count in part
        assert trial.datetime_start is not None
        assert trial.datetime_complete is not None
        first, last = trial.datetime_start.timestamp(), trial.datetime_complete.timestamp()
        inside += max(0.0, min(last, end) - max(first, start)) / (last - first)
    return inside / (end - start), len(trained)


def speed(rounds: int, trials: int) -> Iterator[str]:
    """Turns of one and of two workers; the ratio within a turn."""
    yield "## Two workers and one\n"
    if os.getloadavg()[0] > IDLE:
        yield f"Not measured: the load of the machine was {os.getloadavg()[0]:.1f}."
        return
    yield "| round | trials/s, one worker | two workers | ratio |\n|---|---|---|---|"
    for turn in range(rounds):
        rates = []
        for jobs in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                url = sqlite_url(Path(folder) / "study.db")
                done = study(Path(folder) / "out", url, f"{SPEED} --trials {trials} --jobs {jobs}")
                assert done.returncode == 0, done.stderr
                rates.append(rate(trials_of(url))[0])
        yield f"| {turn + 1} | {rates[0]:.3f} | {rates[1]:.3f} | {rates[1] / rates[0]:.2f} |"


def complaints(text: str) -> list[str]:
    """Lines of a log that tell of locks, errors or dead workers."""
    return [line for line in text.splitlines() if re.search(r"lock|ERROR|FATAL|Traceback|worker died", line)]


def eight(jobs: int, trials: int, rounds: int) -> Iterator[str]:
    """Many workers at one PostgreSQL server."""
    yield f"\n## {jobs} workers at one PostgreSQL server\n"
    yield "| study | workers that trained | trained | twice | proposed again | left running | complaints | seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    shown: list[str] = []
    for turn in range(rounds):
        with servers.postgres() as server, tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            done = study(Path(folder) / "out", server.url, f"{SMALL} --trials {trials} --jobs {jobs} --seed {turn}")
            seconds = time.monotonic() - started
            found = trials_of(server.url)
            said = complaints(done.stderr) + complaints((server.folder / "log").read_text(errors="replace"))
        said += [] if done.returncode == 0 else [f"the command ended with {done.returncode}"]
        trained = [trial for trial in found if is_trained(trial)]
        counts = Counter(trial.user_attrs["digest"] for trial in trained)
        twice = sum(count > 1 for count in counts.values())
        again = sum(REUSED in trial.user_attrs for trial in found)
        left = sum(trial.state == TrialState.RUNNING for trial in found)
        workers = len({trial.user_attrs[WORKER] for trial in trained})
        facts = [turn + 1, workers, len(trained), twice, again, left, len(said), round(seconds)]
        yield f"| {' | '.join(map(str, facts))} |"
        shown += said
    yield from ["", *(f"- {line}" for line in dict.fromkeys(shown))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["speed", "postgresql"], choices=["speed", "postgresql"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=8, help="workers at the PostgreSQL server")
    arguments = parser.parse_args()
    print("# Workers\n")
    options = f"--parts {' '.join(arguments.parts)} --rounds {arguments.rounds} --trials {arguments.trials}"
    print(
        f"`python studies/workers_speed.py {options}`, {datetime.date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}, optuna {optuna.__version__}.\n"
    )
    lines = {
        "speed": lambda: speed(arguments.rounds, arguments.trials),
        "postgresql": lambda: eight(arguments.jobs, arguments.trials, arguments.rounds),
    }
    for part in arguments.parts:
        for line in lines[part]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
