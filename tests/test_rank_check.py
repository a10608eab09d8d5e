"""The rank check end to end: real digits, timm's own small test ResNet."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from injection import exit_code
from other_workers import only_after, others_at_work, shared_storage
from warm import warm_python

from nas_kd.costs.latency import limited_threads
from nas_kd.files.records import Records
from nas_kd.genotype import Genotype
from nas_kd.progress import Advance
from nas_kd.rank_check import genotypes_elsewhere, main, measuring
from nas_kd.rank_check.parts import Measuring
from nas_kd.results.rank_rows import FILE, RankCheck, read_check
from nas_kd.search.jobs import GENOTYPES, done_jobs, post_jobs
from nas_kd.search.storage import close_storage, open_storage
from nas_kd.study import main as study
from nas_kd.worker import main as work
from nas_kd.workers import bundle

BASE = (
    "--model test_resnet --img-size 32 --teacher-epochs 1 --train-images 100 --budget macs=40%"
    " --space width=0.5/1,conv=standard/depthwise --no-search-stages"  # a library of few entries
).split()
SMALL = "--genotypes 3 --truth-images 64 --proxy-images 32 --val-images 20 --batch-size 8".split()
STARTS = ("fresh weights", "closed form", "library")


def records(out: Path) -> Counter[str]:
    """How often each key was written: a part of a genotype."""
    lines = (out / "rank_check.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["key"] for line in lines)


def parts(out: Path) -> list[str]:
    """What is measured of each genotype; a library is there where the study builds one."""
    used = {row.start for row in result(out).groups[0].scores}
    return ["zero-cost", *(start for start in STARTS if start in used), "truth"]


def result(out: Path) -> RankCheck:
    check = read_check(out / FILE)
    assert check is not None
    return check


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A finished check in a process of its own: its folder, and what it printed to both streams."""
    out = tmp_path_factory.mktemp("checks") / "first"
    done = subprocess.run(command(out, "--near", "3"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


@pytest.fixture
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A storage that several machines reach."""
    with shared_storage(request.param, tmp_path) as url:
        yield url


@pytest.fixture
def prepared(finished: tuple[Path, str, str], tmp_path: Path) -> Path:
    """A folder in which teacher, views and library are there, and nothing is measured yet."""
    out = tmp_path / "prepared"
    shutil.copytree(finished[0] / "cache", out / "cache")
    return out


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "nas_kd.rank_check", *BASE, *SMALL, "--out", str(out), *more]


def signalled(out: Path, sent: signal.Signals, count: int) -> Callable[[], int]:
    """What runs the command, which is sent a signal as soon as so many records are written; its exit code."""
    write = Records.__setitem__
    written: list[str] = []

    def noted(records: Records, key: str, record: Any) -> None:
        write(records, key, record)
        written.append(key)
        if len(written) == count:
            signal.raise_signal(sent)

    def run() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Records, "__setitem__", noted)
            return main([*BASE, *SMALL, "--out", str(out)])

    return run


def test_it_prints_every_score_and_where_the_rest_is(finished: tuple[Path, str, str]) -> None:
    out, printed, progress = finished
    assert not re.search(r"Traceback|Warning", progress)
    for title in ("3 random genotypes", "3 genotypes near the optimum"):
        assert title in printed
    for score in ("params", "MACs", "synflow", "gradient norm", "SNIP", "jacob_cov"):
        assert len(re.findall(rf"^{re.escape(score)} ", printed, re.MULTILINE)) == 2
    assert "\ndamage (" in printed
    assert result(out).sentence() in printed
    assert str(out / "rank_check.html") in printed
    assert (out / "rank_check.html").stat().st_size > 1e6


def test_scores_are_taken_on_every_rung_of_every_start(finished: tuple[Path, str, str]) -> None:
    check = result(finished[0])
    starts = parts(finished[0])[1:-1]
    assert check.default == ("accuracy", starts[-1], 4)
    assert check.truth_images == 64
    for group in check.groups:
        found = {(row.name, row.start, row.steps) for row in group.scores}
        assert len(found) == len(group.scores)
        trained = ("sum of training losses", "training losses since the last rung")
        looked = ("accuracy", "error, size allowed for", "distillation loss", "distillation loss, size allowed for")
        if "library" in starts:
            looked = (*looked, "error, damage allowed for")
        for name in (*looked, "cross-entropy", *trained):
            assert {(name, start, steps) for start in starts for steps in (1, 2, 4)} <= found
        assert ("accuracy", "closed form", 0) in found
        assert ("accuracy", "fresh weights", 0) not in found
        taus = [row.tau for row in group.scores if math.isfinite(row.tau)]
        assert taus == sorted(taus, reverse=True)
        for row in group.scores:
            assert len(row.values) == len(group.truth) == 3
            if math.isfinite(row.tau):
                assert row.low <= row.tau <= row.high
            assert 0 <= row.regrets[1] <= row.regrets[0] <= max(group.truth) - min(group.truth)
        for steps in (1, 2, 4):
            plain, sized = (
                group.row(name, "closed form", steps)
                for name in ("distillation loss", "distillation loss, size allowed for")
            )
            assert plain is not None
            assert sized is not None
            factors = np.divide(sized.values, plain.values)
            assert np.array_equal(np.argsort(-factors), np.argsort(group.params))
    rows = [result(finished[0]).groups[0].row("sum of training losses", "closed form", steps) for steps in (1, 2, 4)]
    for one, next_one in itertools.pairwise(row for row in rows if row):
        assert one.values < next_one.values
        assert one.seconds < next_one.seconds


def test_the_same_command_trains_nothing_again(finished: tuple[Path, str, str]) -> None:
    out = finished[0]
    before, written = result(out), records(out)
    assert set(written.values()) == {1}
    assert main([*BASE, *SMALL, "--near", "3", "--out", str(out), "-q"]) == 0
    assert records(out) == written
    assert result(out).groups == before.groups


def test_more_genotypes_and_other_proxies_keep_what_is_known(finished: tuple[Path, str, str], prepared: Path) -> None:
    out = prepared
    (out / "rank_check.jsonl").write_bytes((finished[0] / "rank_check.jsonl").read_bytes())
    before = records(out)
    assert main([*BASE, *SMALL, "--genotypes", "4", "--out", str(out), "-q"]) == 0
    assert Counter(key.split("/")[0] for key in (records(out) - before)) == dict.fromkeys(parts(out), 1)
    before = records(out)
    other = ["--val-images", "10", "--proxy-images", "16"]
    assert main([*BASE, *SMALL, *other, "--out", str(out), "-q"]) == 0
    assert Counter(key.split("/")[0] for key in (records(out) - before)) == dict.fromkeys(parts(out)[1:-1], 3)
    before, slower = records(out), result(out).groups[0]
    assert main([*BASE, *SMALL, *other, "--proxy-lr", "0.05", "--out", str(out), "-q"]) == 0
    inheriting = parts(out)[2:-1]  # from fresh weights the rate is that of a teacher
    assert Counter(key.split("/")[0] for key in (records(out) - before)) == dict.fromkeys(inheriting, 3)
    faster = result(out).groups[0]
    assert faster.truth == slower.truth
    name = "sum of training losses"
    assert faster.row(name, "closed form", 2).values != slower.row(name, "closed form", 2).values  # type: ignore[union-attr]


def test_near_the_optimum_alone_and_as_a_study_trains(finished: tuple[Path, str, str], prepared: Path) -> None:
    out = prepared
    alone = ["--genotypes", "0", "--near", "3", "--starts", "study"]
    assert main([*BASE, *SMALL, *alone, "--out", str(out), "-q"]) == 0
    (near,) = result(out).groups
    assert near.name == "near"
    assert near.digests == result(finished[0]).groups[1].digests
    start = parts(finished[0])[-2]
    assert {row.start for row in near.scores if row.steps} == {start}
    # what is left out changes nothing of what is there, and a fuller check goes on from it
    assert near.row("accuracy", start, 4).values == result(finished[0]).groups[1].row("accuracy", start, 4).values  # type: ignore[union-attr]
    assert records(out).keys() < records(finished[0]).keys()
    assert result(out).sentence().startswith("Measured on 3 students near the optimum")


def test_a_killed_check_goes_on_where_it_was(finished: tuple[Path, str, str], prepared: Path) -> None:
    out = prepared
    assert exit_code(signalled(out, signal.SIGKILL, 5)) == -signal.SIGKILL
    kept = records(out)
    assert not (out / FILE).exists()
    assert main([*BASE, *SMALL, "--out", str(out), "-q"]) == 0
    assert set(records(out).values()) == {1}
    assert kept.keys() < records(out).keys()
    assert len(records(out)) == 3 * len(parts(out))
    # one seed decides everything but the seconds
    for ours, first in zip(result(out).groups[0].scores, result(finished[0]).groups[0].scores, strict=True):
        assert (ours.name, ours.values, ours.tau) == (first.name, first.values, first.tau) or math.isnan(ours.tau)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on two cores, where another process pays."""
    monkeypatch.setattr(measuring, "WORTH", 0.0)
    with limited_threads(2):
        yield


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> list[Genotype]:
    """What the command itself measures."""
    one, found = Measuring.one, list[Genotype]()

    def noted(own: Measuring, genotype: Genotype, tell: Advance) -> None:
        found.append(genotype)
        one(own, genotype, tell)

    monkeypatch.setattr(Measuring, "one", noted)
    return found


def kill_others(jobs: optuna.Study) -> bool:
    """Whether a process was at a job; there is none any more."""
    found = others_at_work(jobs)
    for process in found:
        os.kill(process, signal.SIGKILL)
    return bool(found)


def left_in(url: str) -> list[str]:
    """What a storage still holds."""
    storage = open_storage(url)
    try:
        return optuna.get_all_study_names(storage)
    finally:
        close_storage(storage)


def check_same(out: Path, finished: tuple[Path, str, str]) -> None:
    """What was measured with others is what one process measures, and nothing of the sharing is left."""
    assert set(records(out).values()) == {1}
    ours, first = result(out).groups[0], result(finished[0]).groups[0]
    start = parts(finished[0])[-2]
    assert ours.truth == first.truth
    assert ours.row("accuracy", start, 4).values == first.row("accuracy", start, 4).values  # type: ignore[union-attr]


@pytest.mark.usefixtures("two_threads")
def test_another_process_measures_the_same(
    finished: tuple[Path, str, str], prepared: Path, mine: list[Genotype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(genotypes_elsewhere, "do_jobs", only_after(done_jobs))
    assert main([*BASE, *SMALL, "--starts", "study", "--out", str(prepared), "-q"]) == 0
    assert 1 <= len(mine) < 3
    check_same(prepared, finished)
    assert left_in(f"sqlite:///{prepared / 'study.db'}") == []


@pytest.mark.usefixtures("two_threads")
def test_what_a_process_that_dies_had_taken_is_measured_here(
    finished: tuple[Path, str, str],
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(genotypes_elsewhere, "do_jobs", only_after(kill_others))
    assert main([*BASE, *SMALL, "--starts", "study", "--out", str(prepared)]) == 0
    assert capsys.readouterr().err.count("a process beside this one ended") == 1
    check_same(prepared, finished)


@pytest.mark.parametrize("shared", [pytest.param("postgresql", marks=pytest.mark.slow), "sqlite"], indirect=True)
def test_a_worker_on_another_machine_measures_the_same(
    shared: str,
    finished: tuple[Path, str, str],
    prepared: Path,
    tmp_path: Path,
    mine: list[Genotype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another machine: its folder is its own, and what it needs is in the artifact store alone."""
    describe = bundle._describe
    monkeypatch.setattr(bundle, "_describe", lambda *given: dataclasses.replace(describe(*given), folder="elsewhere"))
    monkeypatch.setattr(genotypes_elsewhere, "do_jobs", only_after(done_jobs))
    joining = ["--storage", shared, "--wait", "600", "--out", str(tmp_path / "joined"), "--device", "cpu"]
    worker = subprocess.Popen(
        [warm_python(), "-m", "nas_kd.worker", *joining], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    stored = ["--storage", shared, "--artifacts", str(tmp_path / "store")]
    assert main([*BASE, *SMALL, "--starts", "study", "--out", str(prepared), "-q", *stored]) == 0
    printed, said = worker.communicate(timeout=600)
    assert worker.returncode == 0, said
    assert re.search(r"the rank check has its genotypes; [123] of them were this worker's", printed)
    assert len(mine) < 3
    check_same(prepared, finished)
    assert left_in(shared) == []


def test_what_another_version_left_is_put_away(prepared: Path, tmp_path: Path) -> None:
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    storage = open_storage(shared)
    left = post_jobs(storage, "test_resnet-digits-macs40%", ["an older key"], GENOTYPES)
    left.set_user_attr(bundle.BUNDLE, {"version": "0.0.1"})
    close_storage(storage)
    assert main([*BASE, *SMALL, "--starts", "study", "--out", str(prepared), "-q", "--storage", shared]) == 0
    assert left_in(shared) == []


@pytest.mark.usefixtures("two_threads")
def test_a_worker_of_another_version_measures_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it would find has other keys; the command goes on without it."""
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    joining = ["--storage", shared, "--device", "cpu", "--out", str(tmp_path / "joined"), "--part", "genotypes", "-q"]
    plan = genotypes_elsewhere.GenotypesPlan

    def other(**facts: Any) -> genotypes_elsewhere.GenotypesPlan:
        return plan(**{**facts, "keys": {**facts["keys"], "truth": "another"}})

    def do(jobs: Any, *arguments: Any, **more: Any) -> int:
        assert work(joining) == 2
        return do_jobs(jobs, *arguments, **more)

    do_jobs = genotypes_elsewhere.do_jobs
    monkeypatch.setattr(genotypes_elsewhere, "GenotypesPlan", other)
    monkeypatch.setattr(genotypes_elsewhere, "do_jobs", do)
    assert main([*BASE, *SMALL, "--starts", "study", "--out", str(prepared), "-q", "--storage", shared]) == 0
    assert "use the same versions of nas_kd and timm" in capsys.readouterr().err


def test_ctrl_c_says_that_nothing_is_lost(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert signalled(prepared, signal.SIGINT, 1)() == 130
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["", "--search-stages"])
def test_a_study_of_the_same_space_quotes_it(finished: tuple[Path, str, str], prepared: Path, asked: str) -> None:
    (prepared / FILE).write_bytes((finished[0] / FILE).read_bytes())
    few = "--batch-size 8 --trials 1 --front 1 --proxy-epochs 1 --refine-epochs 1 --no-onnx --no-base-bounds".split()
    few += "--library-budget 0 --no-baselines -q".split()
    assert study([*BASE, *asked.split(), *few, "--out", str(prepared)]) == 0
    report = (prepared / "report.html").read_text()
    assert "How far to trust the ranking" in report
    assert ("Measured on 3 random students" in report) == (not asked)
    assert ("Not measured: python -m nas_kd.rank_check" in report) == bool(asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --budget"),
        (["--budget", "macs=30%", "--genotypes", "2"], "--genotypes 2 have no order to speak of"),
        (["--budget", "macs=30%", "--genotypes", "0"], "--genotypes 0 with --near 0 leaves nothing to train"),
        (["--budget", "macs=30%", "--near", "2"], "--near 2 have no order to speak of"),
        (["--budget", "macs=30%", "--band", "1.5"], "--band: must be at least 0.001 and below 1"),
        (["--budget", "macs=30%", "--proxy-images", "100", "--truth-images", "150"], "is no truth beside"),
        (["--budget", "macs=30%", "--trials", "3"], "unrecognized arguments: --trials 3"),
        (["--budget", "mac=30%"], "did you mean 'macs'"),
        (["--budget", "macs=0.1%", "--model", "test_resnet", "--img-size", "32"], "the smallest reachable is macs="),
        (["--budget", "macs=2000%", "--model", "test_resnet", "--img-size", "32"], "widen --band"),
        (["--budget", "macs=30%", "--device", "nowhere"], "there is no device 'nowhere'"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_records_that_cannot_be_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank_check.jsonl").mkdir()
    assert main([*BASE, *SMALL, "--out", str(tmp_path), "-q"]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_trainings_that_all_diverge_leave_nothing_to_rank(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, *SMALL, "--lr", "1e30", "--out", str(prepared), "-q"]) == 2
    assert "0 of 3 long trainings ended with an accuracy" in capsys.readouterr().err
