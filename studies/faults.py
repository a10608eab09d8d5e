"""A fault campaign: processes of studies are killed at random moments, their database crashes, nothing may be lost.

    python studies/faults.py > docs/results/faults.md               # 50 kills on SQLite and 50 on PostgreSQL: an hour
    python studies/faults.py --kills 3 --trials 4 --storage sqlite  # the short form, as in tests/test_faults.py

Each round draws a stage of a study's way, starts its command anew, waits for that stage and, for a random time, in it,
and sends SIGKILL to a random process: the command itself or one of its workers. What has the stage behind it comes to
its end, and the next study is killed there, so that start-up, refinement and export get as many kills as trials do. On
PostgreSQL, a server of its own, every fifth round the server crashes as well. A study that reaches its end is checked
as a whole, and the next one begins: no finished trial may have changed or vanished, none been trained twice, none be
left running, every weight file must be readable and every model within the budget. The exit code is 1 when something
was lost.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
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

BUDGET = 0.6  # of the base's parameters
GRACE = 8
START = "start"  # all before the first progress line
STAGES = (START, "data", "teacher", "views", "library", "search", "refine", "export")  # in the words of those lines
WITHIN = {START: 6.0, "search": 20.0, "library": 5.0, "refine": 1.0}  # seconds of a stage; the others end at once
MISSES = 3  # of a stage that is over before it is seen, until what comes next is killed


@dataclass
class Subject:
    """A study that is killed again and again: its name, its folder, its storage, and what it had finished."""

    name: str
    out: Path
    url: str
    trials: int
    jobs: int
    finished: dict[int, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """What all its commands said."""
        return self.out.parent / f"{self.name}.log"

    def command(self) -> list[str]:
        """The study's command: small, but through every stage."""
        arguments = (
            "--model test_resnet --img-size 32 --train-images 120 --teacher-epochs 4 --proxy-epochs 8 --front 2 "
        )
        arguments += f"--refine-epochs 8 --library-budget 0.2 --budget params={BUDGET:.0%} --trials {self.trials} "
        arguments += f"--jobs {self.jobs} --study-name {self.name} --grace-period {GRACE}"
        return [sys.executable, "-m", "nas_kd.study", *arguments.split(), "--out", str(self.out), "--storage", self.url]

    def look(self) -> None:
        """No trial that was finished may change or vanish."""
        now = {trial.number: facts(trial) for trial in self.found() if trial.state.is_finished()}
        for number, before in self.finished.items():
            if now.get(number) != before:
                self.problems.append(f"{self.name}: trial {number} was {before}, is {now.get(number)}")
        self.finished = now

    def found(self) -> list[FrozenTrial]:
        """The trials of the study; none while there is none."""
        if self.url.startswith("sqlite") and not (self.out / "study.db").exists():
            return []
        storage = open_storage(self.url)
        try:
            return optuna.load_study(study_name=self.name, storage=storage).get_trials()
        except KeyError:
            return []
        finally:
            close_storage(storage)

    def ended(self, code: int) -> None:
        """Its command came to an end by itself: everything is checked."""
        self.look()
        if code:
            last = self.log.read_text().strip().splitlines()[-1:]
            self.problems.append(f"{self.name}: a run ended with {code}: {last}")
            return
        trials = [*check_trials(self.found(), self.trials, self.jobs), *check_files(self.out)]
        self.problems += [f"{self.name}: {problem}" for problem in trials]

    def finish(self) -> None:
        """Runs the command to its end and checks everything."""
        with self.log.open("a") as log:
            self.ended(subprocess.run(self.command(), stdout=log, stderr=log, check=False).returncode)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """When processes are killed: within one of `stages`, `longest` seconds after it began at most."""

    seed: int = 0
    longest: float = 40
    stages: tuple[str, ...] = STAGES


@dataclass
class Campaign:
    """Kills of one study after another, in an empty folder."""

    folder: Path
    server: servers.Postgres | None
    trials: int
    moments: Moments
    generator: random.Random
    subjects: list[Subject] = field(default_factory=list)
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)  # by stage and victim
    restarts: int = 0
    stage: str = ""  # in which the next kill is due
    misses: int = 0

    @property
    def problems(self) -> list[str]:
        """What was lost."""
        return [problem for subject in self.subjects for problem in subject.problems]

    def begin(self) -> Subject:
        """The next study."""
        name = f"faults{len(self.subjects)}"
        out = self.folder / name
        url = f"sqlite:///{out / 'study.db'}" if self.server is None else self.server.url
        self.subjects.append(Subject(name, out, url, self.trials, 2))
        return self.subjects[-1]

    def run(self, kills: int) -> None:
        """So many kills; then the last study is run to its end."""
        subject = self.begin()
        while self.kills.total() < kills:
            if not self.kill_once(subject):
                subject = self.begin()
            elif self.server is not None and self.kills.total() % 5 == 0:
                self.server.stop()
                self.server.start()
                self.restarts += 1
            subject.look()
        subject.finish()

    def kill_once(self, subject: Subject) -> bool:
        """Starts the command, waits and kills one of its processes; False when the command ended before."""
        said = subject.log.stat().st_size if subject.log.exists() else 0
        with subject.log.open("a") as log:
            process = subprocess.Popen(subject.command(), stdout=log, stderr=log)
        if not self._wait(process, subject, said):
            subject.ended(process.returncode)
            return False
        self.kills[stage_of(subject, said), self._kill_one_of(process)] += 1
        return True

    def _wait(self, process: subprocess.Popen[bytes], subject: Subject, said: int) -> bool:
        """Until the moment of the kill; False when the command ends before it."""
        self.stage = self.stage or self.generator.choice(self.moments.stages)
        due = STAGES.index(self.stage)
        while (now := STAGES.index(stage_of(subject, said))) < due:
            if not still_runs(process, 0.02):
                return False
        if now > due and self.misses < MISSES:
            self.misses += 1
            process.wait()
            return False
        longest = min(WITHIN.get(self.stage, 0.1), self.moments.longest)
        if not still_runs(process, self.generator.uniform(0, longest)):
            return False
        self.stage, self.misses = "", 0
        return True

    def _kill_one_of(self, process: subprocess.Popen[bytes]) -> str:
        workers = children(process.pid)
        victim = self.generator.choice([process.pid, *workers])
        with suppressed():
            os.kill(victim, signal.SIGKILL)
        if victim != process.pid:  # the command replaces it; then it goes, too
            time.sleep(self.generator.uniform(0, 3))
            process.kill()
        process.wait()
        for worker in workers:  # they follow their command by themselves
            wait_for_end(worker)
        return "command" if victim == process.pid else "worker, then command"


def still_runs(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits, and tells whether the process is there after that."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def stage_of(subject: Subject, said: int) -> str:
    """The stage that a command is at, by the last line of its log that tells; `said` bytes were there before it."""
    with subject.log.open("rb") as log:
        log.seek(said)
        text = log.read().decode(errors="replace")
    begun = re.findall(rf"^({'|'.join(STAGES)}): \d+ step", text, re.MULTILINE)
    return str(begun[-1]) if begun else START


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


def run(folder: Path, kills: int, storage: str, trials: int, moments: Moments) -> Campaign:
    """A campaign of so many kills in an empty folder; on PostgreSQL the server itself crashes now and then as well."""
    with servers.postgres() if storage == "postgresql" else nullcontext() as server:
        campaign = Campaign(folder, server, trials, moments, random.Random(moments.seed))
        campaign.run(kills)
    return campaign


def report(campaign: Campaign, storage: str, seconds: float) -> Iterator[str]:
    """A part of the page of results."""
    yield f"## {storage}\n"
    yield (
        f"{campaign.kills.total()} kills over {len(campaign.subjects)} studies of {campaign.trials} trials, "
        f"{campaign.restarts} crashes of the server, {seconds:.0f} s. Trials finished at the end: "
        f"{sum(len(subject.finished) for subject in campaign.subjects)}. **Problems: {len(campaign.problems)}.**\n"
    )
    yield "| killed in stage | the command | a worker, then the command |\n|---|---|---|"
    for stage in STAGES:
        counts = [campaign.kills[stage, victim] for victim in ("command", "worker, then command")]
        yield f"| {stage} | {counts[0]} | {counts[1]} |"
    yield from ["", *(f"- {problem}" for problem in campaign.problems)]


def main() -> int:
    """Runs the campaigns of the command line and prints what came of them."""
    parser = argparse.ArgumentParser(description="Kills processes of studies at random moments and checks the rest.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--storage", nargs="+", choices=("sqlite", "postgresql"), default=["sqlite", "postgresql"])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=40, help="seconds of a stage until a kill, at most")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="kill within these alone")
    arguments = parser.parse_args()
    moments = Moments(seed=arguments.seed, longest=arguments.longest, stages=tuple(arguments.stages))
    print("# Kills at random moments\n")
    print(
        f"`python studies/faults.py {' '.join(sys.argv[1:])}`, seed {arguments.seed}, {datetime.date.today()}, "
        f"{platform.machine()}, {os.cpu_count()} cores of a shared machine, optuna {optuna.__version__}.\n"
    )
    print(" ".join(__doc__.split("\n\n")[2].split()), flush=True)
    lost = False
    for storage in arguments.storage:
        folder, started = Path(tempfile.mkdtemp(prefix="faults-")), time.monotonic()
        campaign = run(folder, arguments.kills, storage, arguments.trials, moments)
        print("\n" + "\n".join(report(campaign, storage, time.monotonic() - started)), flush=True)
        lost = lost or bool(campaign.problems)
        if not campaign.problems:
            shutil.rmtree(folder)
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
