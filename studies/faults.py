"""A fault campaign: processes of a study are killed at random moments, its database restarted, and nothing may be lost.

    python studies/faults.py --kills 50 --storage sqlite            # or postgresql: a server of its own is started
    python studies/faults.py --kills 3 --storage sqlite --trials 4  # the short form, as in tests/test_faults.py

Each round starts the study's command anew, waits a random time and sends SIGKILL to a random process of it: the command
itself, which is at any of its stages, or one of its workers. After the last one the command runs to its end and
everything is checked; the exit code is 1 when something was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import optuna
import servers
from optuna.trial import FrozenTrial, TrialState
from safetensors import SafetensorError, safe_open

import nas_kd
from nas_kd.search.claims import is_trained
from nas_kd.search.storage import close_storage, open_storage

NAME = "faults"
BUDGET = 0.6  # of the base's parameters
GRACE = 8


@dataclass
class Campaign:
    """What is done to a study, and what came of it."""

    out: Path
    url: str
    trials: int
    jobs: int
    longest: float
    generator: random.Random
    finished: dict[int, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    stages: Counter[str] = field(default_factory=Counter)

    def command(self) -> list[str]:
        """The study's command: small, but through every stage."""
        arguments = (
            "--model test_resnet --img-size 32 --train-images 120 --teacher-epochs 2 --proxy-epochs 8 --front 2 "
        )
        arguments += f"--refine-epochs 1 --library-budget 0.2 --budget params={BUDGET:.0%} --trials {self.trials} "
        arguments += f"--jobs {self.jobs} --study-name {NAME} --grace-period {GRACE}"
        return [sys.executable, "-m", "nas_kd.study", *arguments.split(), "--out", str(self.out), "--storage", self.url]

    def kill_once(self) -> None:
        """Starts the command, waits and kills one of its processes; or lets it finish, if it is faster."""
        with (self.out.parent / "log").open("a") as log:
            process = subprocess.Popen(self.command(), stdout=log, stderr=log)
        wait = self.generator.uniform(0.5, self.longest)
        try:
            process.wait(wait)
            self.stages["finished before"] += 1
        except subprocess.TimeoutExpired:
            self._kill_one_of(process)
        self.look()

    def _kill_one_of(self, process: subprocess.Popen[bytes]) -> None:
        workers = children(process.pid)
        victim = self.generator.choice([process.pid, *workers])
        self.stages["command" if victim == process.pid else "worker"] += 1
        for pid in [victim]:
            with nullcontext() if pid == process.pid else suppressed():
                os.kill(pid, signal.SIGKILL)
        if victim != process.pid:  # the command replaces it; then it goes, too
            time.sleep(self.generator.uniform(0, 3))
            process.kill()
        process.wait()
        for worker in workers:  # they follow their command by themselves
            wait_for_end(worker)

    def look(self) -> None:
        """No trial that was finished may change or vanish."""
        now = {trial.number: facts(trial) for trial in self.found() if trial.state.is_finished()}
        for number, before in self.finished.items():
            if now.get(number) != before:
                self.problems.append(f"trial {number} was {before}, is {now.get(number)}")
        self.finished = now

    def found(self) -> list[FrozenTrial]:
        """The trials of the study; none while there is none."""
        if self.url.startswith("sqlite") and not (self.out / "study.db").exists():
            return []
        storage = open_storage(self.url)
        try:
            return optuna.load_study(study_name=NAME, storage=storage).get_trials()
        except KeyError:
            return []
        finally:
            close_storage(storage)

    def finish(self) -> None:
        """Runs the command to its end and checks everything."""
        done = subprocess.run(self.command(), capture_output=True, text=True, check=False)
        if done.returncode:
            self.problems.append(f"the last run ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
            return
        self.look()
        self.problems += [*check_trials(self.found(), self.trials, self.jobs), *check_files(self.out)]


def facts(trial: FrozenTrial) -> tuple[Any, ...]:
    """What must stay of a finished trial."""
    return trial.state.name, trial.values, trial.user_attrs.get("digest"), dict(trial.constraints)


def check_trials(trials: list[FrozenTrial], wanted: int, jobs: int) -> Iterator[str]:
    """None runs any more, none was trained twice, all that trained are within the budget, and there are enough."""
    trained = [trial for trial in trials if is_trained(trial)]
    yield from (f"trial {trial.number} still runs" for trial in trials if trial.state == TrialState.RUNNING)
    counts = Counter(trial.user_attrs["digest"] for trial in trained)
    yield from (f"{digest} was trained {count} times" for digest, count in counts.items() if count > 1)
    yield from (f"trial {trial.number} is over budget" for trial in trained if trial.constraints["params"] > 0)
    if not wanted <= len(trained) < wanted + jobs:
        yield f"{len(trained)} trials trained, {wanted} were wanted"


def check_files(out: Path) -> Iterator[str]:
    """Every weight file can be read; every model of the front is loaded and within the budget."""
    for path in out.rglob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                _ = [file.get_tensor(name).shape for name in file.keys()]
        except (SafetensorError, OSError) as error:
            yield f"{path} is corrupt: {error}"
    models = [path.parent for path in out.glob("*/config.json")]
    costs = {}
    for model in models:
        role = json.loads((model / "config.json").read_text())["nas_kd"]["role"]
        costs[model.name, role] = sum(p.numel() for p in nas_kd.load(model).parameters())
    (base,) = (cost for (_, role), cost in costs.items() if role == "teacher")
    yield from (
        f"{name} is over budget" for (name, role), cost in costs.items() if role == "front" and cost > BUDGET * base
    )


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@contextmanager
def suppressed() -> Iterator[None]:
    """Around what may have ended by itself."""
    try:
        yield
    except ProcessLookupError:
        pass


def wait_for_end(pid: int, patience: float = 60) -> None:
    """Until a process is gone."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.1)


def run(folder: Path, kills: int, storage: str, trials: int = 12, seed: int = 0, longest: float = 40) -> Campaign:
    """A campaign of so many kills in an empty folder; on PostgreSQL the server itself crashes now and then as well."""
    with servers.postgres() if storage == "postgresql" else nullcontext() as server:
        url = server.url if server is not None else f"sqlite:///{folder / 'out' / 'study.db'}"
        campaign = Campaign(folder / "out", url, trials, 2, longest, random.Random(seed))
        for number in range(kills):
            campaign.kill_once()
            if server is not None and number % 5 == 4:
                server.stop()
                server.start()
        campaign.finish()
    return campaign


def main() -> int:
    """Runs the campaign of the command line and prints what came of it."""
    parser = argparse.ArgumentParser(description="Kills processes of a study at random moments and checks the rest.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--storage", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=40, help="seconds until a kill, at most")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    started = time.monotonic()
    campaign = run(folder, **vars(arguments))
    print(f"| {arguments.storage} | {arguments.kills} | {dict(campaign.stages)} | {len(campaign.problems)} problems |")
    print(f"{time.monotonic() - started:.0f} s")
    for problem in campaign.problems:
        print(f"PROBLEM: {problem}")
    if not campaign.problems:
        shutil.rmtree(folder)
    return int(bool(campaign.problems))


if __name__ == "__main__":
    sys.exit(main())
