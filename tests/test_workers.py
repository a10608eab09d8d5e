"""Several processes at one study: killed, stopped, behind a proxy, and with whatever may be wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import servers
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import OperationalError
from warm import warm_python

from nas_kd.budget import LATENCY
from nas_kd.errors import OutputError
from nas_kd.search.storage import close_storage, open_storage
from nas_kd.search.workers import WORKER
from nas_kd.study import main
from nas_kd.worker import main as work

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),  # optuna: the gRPC proxy
    pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning"),  # optuna: ask without optimize
]
SMALL = "--model test_resnet --img-size 32 --teacher-epochs 1 --refine-epochs 1 --train-images 120 --library-budget 0"
SMALL += " --space width=0.25/0.5/1,kernel,conv=standard/depthwise --no-search-stages --no-base-bounds --no-onnx"
SMALL += " --no-baselines"
NAME = "s"
EPOCHS = "6"  # of the trials of a finished study
needs_postgres = pytest.mark.skipif(servers.postgres_folder() is None, reason="PostgreSQL is not installed")


def command(out: Path, *more: str) -> list[str]:
    fixed = f"--budget params=60% --front 1 --study-name {NAME} --sampler random --grace-period 6"
    return [*SMALL.split(), *fixed.split(), "--out", str(out), *more]


def start(module: str, arguments: list[str], warm: bool = True) -> subprocess.Popen[str]:
    # Ray's tasks give way to others by default, and would starve beside a busy process
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    return subprocess.Popen(
        [warm_python() if warm else sys.executable, "-m", module, *arguments],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )


def reading(url: str, wait: float = 60.0) -> optuna.storages.BaseStorage:
    """A storage to look into. A database that is locked is waited for."""
    if not url.startswith("sqlite"):
        return open_storage(url)
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": wait}})


def trials(url: str) -> list[FrozenTrial]:
    """The trials of the study."""
    storage = reading(url)
    try:
        return optuna.load_study(study_name=NAME, storage=storage).get_trials()
    finally:
        close_storage(storage)


def stop_a_worker(url: str, process: subprocess.Popen[str], patience: float = 1800) -> int:
    """The process number of a worker whose trial has come to its first rung: it is stopped, so that its trial runs for
    as long as it takes to look. The caller kills it or lets it go on."""
    deadline, study = time.monotonic() + patience, None
    while time.monotonic() < deadline and process.poll() is None:
        study = study or begun_study(url)  # opened once: that takes longer than a look
        for worker in at_a_rung(study):
            os.kill(worker, signal.SIGSTOP)
            if worker in at_a_rung(study):
                close_storage(study._storage)  # type: ignore[union-attr]
                return worker
            os.kill(worker, signal.SIGCONT)  # it was quicker, or holds the database
        time.sleep(0.1)
    raise AssertionError(f"no trial came to its first rung: {process.communicate()[1]}")


def begun_study(url: str) -> optuna.Study | None:
    """The study, once it is there."""
    if url.startswith("sqlite") and not Path(url.removeprefix("sqlite:///")).exists():
        return None
    try:
        return optuna.load_study(study_name=NAME, storage=reading(url, wait=1.0))
    except (KeyError, OutputError, StorageInternalError, OperationalError):  # tables are being made
        return None


def at_a_rung(study: optuna.Study | None) -> set[int]:
    """The process numbers of the workers whose trials have come to their first rung."""
    try:
        found = study.get_trials(deepcopy=False) if study else []
    except (StorageInternalError, OperationalError):  # a worker that was stopped in the midst of a write keeps others
        return set()
    running = [trial.user_attrs for trial in found if trial.state == TrialState.RUNNING]
    return {int(noted[WORKER].rpartition(":")[2]) for noted in running if {"rung/1", WORKER} <= noted.keys()}


def has_a_signal(process: int) -> bool:
    """Whether a stopped process is to be sent a signal as soon as it goes on."""
    status = Path(f"/proc/{process}/status").read_text()
    pending = re.search(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)
    assert pending is not None
    return int(pending[1], 16) != 0


def check_nothing_lost(found: list[FrozenTrial], trained: int) -> None:
    """Every digest was trained once, nothing runs any more, and there are as many as were asked for."""
    assert not [trial for trial in found if trial.state == TrialState.RUNNING]
    done = [trial for trial in found if "rung" in trial.constraints and "reused" not in trial.user_attrs]
    done = [trial for trial in done if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert max(Counter(trial.user_attrs["digest"] for trial in done).values()) == 1
    assert trained <= len(done) <= trained + 1
    assert all(value <= 0 for trial in done for key, value in trial.constraints.items() if key != "rung")


@pytest.fixture(scope="module")
def server() -> Iterator[servers.Postgres]:
    with servers.postgres() as running:
        yield running


@pytest.fixture
def database(server: servers.Postgres) -> str:
    """The URL of an empty database."""
    server.sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return server.url


@pytest.fixture
def shared(request: pytest.FixtureRequest, database: str) -> Iterator[str]:
    """A storage that machines share: PostgreSQL, and Optuna's proxy in front of it."""
    if request.param == "postgresql":
        yield database
    else:
        with servers.grpc_proxy(database) as address:
            yield address


@needs_postgres
@pytest.mark.parametrize("shared", [pytest.param("postgresql", marks=pytest.mark.slow), "grpc"], indirect=True)
def test_of_two_workers_one_is_killed_and_the_study_completes(shared: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # a grace that no living worker exceeds on a busy machine: who looks first sees that a process is there no more
    more = ["--proxy-epochs", "6", "--trials", "4", "--jobs", "2", "--grace-period", "600"]
    process = start("nas_kd.study", command(out, *more, "--storage", shared))
    os.kill(stop_a_worker(shared, process), signal.SIGKILL)
    errors = process.communicate(timeout=1200)[1]
    assert process.returncode == 0, errors
    found = trials(shared)
    check_nothing_lost(found, 4)
    (dead,) = [trial for trial in found if trial.state == TrialState.FAIL]
    (retry,) = [trial for trial in found if trial.user_attrs.get("retry of") == dead.number]
    assert retry.user_attrs["digest"] == dead.user_attrs["digest"]
    assert retry.user_attrs["rung/1"] == dead.user_attrs["rung/1"]
    assert len({trial.user_attrs[WORKER] for trial in found if WORKER in trial.user_attrs}) >= 2
    assert (out / "front.csv").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_ctrl_c_stops_all_workers_and_the_same_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    url = f"sqlite:///{out / 'study.db'}"
    # a grace that no living worker exceeds on a busy machine: the one that is stopped here must not be taken for dead
    arguments = command(out, "--proxy-epochs", "6", "--trials", "2", "--jobs", "2", "--grace-period", "600")
    process = start(
        "nas_kd.study",
        arguments,
        warm=False,  # a worker that is killed because it does not stop is gone then, and not a moment later
    )
    worker = stop_a_worker(url, process)
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 600
    while not has_a_signal(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(worker, signal.SIGCONT)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    before = trials(url)
    assert not [trial for trial in before if trial.state == TrialState.RUNNING]
    (stopped,) = [trial for trial in before if trial.state == TrialState.WAITING and "rung/1" in trial.user_attrs][:1]
    assert stopped.user_attrs["retries"] == 0  # an interrupted trial is not a dead one
    assert main([*arguments, "-q", "--jobs", "1"]) == 0
    check_nothing_lost(trials(url), 2)


@needs_postgres
@pytest.mark.parametrize("shared", [pytest.param("postgresql", marks=pytest.mark.slow), "grpc"], indirect=True)
def test_a_worker_on_another_machine_gets_all_it_needs(shared: str, tmp_path: Path) -> None:
    """Another machine: the study's folder is gone, and a silent worker of a third one left a trial."""
    store = tmp_path / "store"
    first = command(tmp_path / "first", "--trials", "1", "--proxy-epochs", "1", "--storage", shared, "-q")
    assert main([*first, "--artifacts", str(store), "--library-budget", "0.1", "--base-bounds"]) == 0
    storage = open_storage(shared)
    study = optuna.load_study(study_name=NAME, storage=storage)
    bundle = study.user_attrs["nas_kd kit"]
    study.set_user_attr("nas_kd kit", {**bundle, "settings": {**bundle["settings"], "trials": 3}})
    latencies = study.user_attrs["nas_kd latency"]
    study.set_user_attr("nas_kd latency", {**latencies, "facts": {"machine": "another one"}})
    silent = study.ask()
    silent.set_user_attr(WORKER, "elsewhere-0000:1")
    (tmp_path / "first").rename(tmp_path / "gone")
    joined = ["--storage", shared, "--study-name", NAME, "--out", str(tmp_path / "second"), "--grace-period", "4", "-q"]
    assert work(joined) == 0
    found = trials(shared)
    check_nothing_lost(found, 3)
    for trial in found[1:]:  # nothing is timed here: latencies are those that are expected there
        assert trial.state != TrialState.COMPLETE or trial.user_attrs[LATENCY] > 0
        assert "measured" not in trial.user_attrs
    assert found[silent.number].state == TrialState.FAIL or shared.startswith("postgresql")
    assert {path.name for path in (tmp_path / "second" / "cache").iterdir()} >= {bundle["weights"], bundle["views"]}
    close_storage(storage)


def test_a_worker_that_is_killed_is_restarted_by_ray(mistake: Path) -> None:
    pytest.importorskip("ray")
    url = f"sqlite:///{mistake / 'study.db'}"
    study = optuna.load_study(study_name=NAME, storage=url)
    bundle = study.user_attrs["nas_kd kit"]
    study.set_user_attr("nas_kd kit", {**bundle, "settings": {**bundle["settings"], "trials": 3}})
    process = start(
        "nas_kd.worker", [*joining(mistake), "--jobs", "1", "--ray", "local", "--grace-period", "600"], warm=False
    )
    os.kill(stop_a_worker(url, process), signal.SIGKILL)
    errors = process.communicate(timeout=1200)[1]
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    found = trials(url)
    check_nothing_lost(found, 3)
    dead = [trial for trial in found if trial.state == TrialState.FAIL]
    assert [trial.user_attrs["retry of"] for trial in found if "retry of" in trial.user_attrs] == [
        trial.number for trial in dead
    ]
    assert len({trial.user_attrs[WORKER] for trial in found if WORKER in trial.user_attrs}) >= 3


# what may be wrong


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study with an artifact store, and its output folder gone."""
    folder = tmp_path_factory.mktemp("begun")
    more = ["--trials", "1", "--proxy-epochs", EPOCHS, "--storage", f"sqlite:///{folder / 'study.db'}", "-q"]
    assert main([*command(folder / "out", *more), "--artifacts", str(folder / "store")]) == 0
    (folder / "out").rename(folder / "gone")
    return folder


@pytest.fixture
def mistake(begun: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    import shutil

    return Path(shutil.copytree(begun, tmp_path / "copy"))


def joining(folder: Path, *more: str) -> list[str]:
    store, out = str(folder / "store"), str(folder / "fetched")
    return ["--storage", f"sqlite:///{folder / 'study.db'}", "--artifacts", store, "--out", out, *more]


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert re.fullmatch(r"nas_kd: [^\n]+\n", text), text
    return text


def test_a_worker_of_a_finished_study_ends_at_once(mistake: Path) -> None:
    assert work(joining(mistake, "-q")) == 0
    assert len(trials(f"sqlite:///{mistake / 'study.db'}")) >= 1


def test_an_artifact_that_is_missing_is_one_line(mistake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (mistake / "store").iterdir():
        path.unlink()
    assert work(joining(mistake, "-q")) == 2
    assert re.search(
        r"cannot fetch weights-\w+\.safetensors from the artifact store .* it is not there", only_line(capsys)
    )


def test_an_artifact_that_was_altered_is_one_line(mistake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (mistake / "store").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert work(joining(mistake, "-q")) == 2
    assert "was altered: its SHA-256 is wrong" in only_line(capsys)
    assert not list((mistake / "fetched").rglob("*.safetensors"))


def test_a_fetched_file_that_was_altered_is_one_line(mistake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert work(joining(mistake, "-q")) == 0
    (weights,) = (mistake / "fetched" / "cache").glob("weights-*")
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\x00\x00\x00\x3f"
    weights.write_bytes(data)
    assert work(joining(mistake, "-q")) == 2
    assert "is missing or was altered (it holds other weights)" in only_line(capsys)


def test_without_store_and_folder_a_worker_says_what_it_lacks(
    mistake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{mistake / 'study.db'}"
    study = optuna.load_study(study_name=NAME, storage=url)
    study.set_user_attr("nas_kd kit", {**study.user_attrs["nas_kd kit"], "artifacts": None, "files": {}})
    assert work(["--storage", url, "--out", str(mistake / "fetched"), "-q"]) == 2
    assert "run its command with --artifacts STORE" in only_line(capsys)


def test_another_version_and_a_foreign_study_are_refused(mistake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{mistake / 'study.db'}"
    study = optuna.load_study(study_name=NAME, storage=url)
    study.set_user_attr("nas_kd kit", {**study.user_attrs["nas_kd kit"], "version": "0.0.1"})
    assert work(joining(mistake, "-q")) == 2
    assert "was begun by nas_kd 0.0.1" in only_line(capsys)
    foreign = optuna.create_study(study_name="foreign", storage=url)
    foreign.add_trial(optuna.trial.create_trial(value=0.5))
    assert work(joining(mistake, "-q", "--study-name", "foreign")) == 2
    assert "'foreign' in this storage was not made by nas_kd" in only_line(capsys)
    assert work(joining(mistake, "-q")) == 2
    assert "holds 2 studies: give --study-name" in only_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--storage postgresql+psycopg://me:secret@127.0.0.1:1/x", r"cannot open the storage .*me:\*\*\*@127"),
        ("--storage grpc://nohost", "write a proxy's address like grpc://HOST:PORT"),
        ("--storage nonsense", "cannot open the storage nonsense"),
        ("", "a worker needs the study's storage"),
        ("--storage sqlite:///{folder}/empty.db", "the storage holds no study yet"),
        ("--storage sqlite:///{folder}/study.db --study-name t", "holds no study 't'; did you mean|holds no study 't'"),
        ("--storage sqlite:///{folder}/study.db --num-gpus 1", "--num-gpus is what Ray gives to a worker: add --ray"),
        ("--storage sqlite:///{folder}/study.db --device cuda:99", "there is no device 'cuda:99'"),
    ],
)
def test_what_a_worker_may_be_given(
    arguments: str, words: str, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert work([*arguments.format(folder=begun).split(), "-q"]) == 2
    line = only_line(capsys)
    assert re.search(words, line)
    assert "secret" not in line


def test_a_study_begun_with_several_objectives_is_no_study_of_one(
    mistake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{mistake / 'study.db'}"
    arguments = command(mistake / "out", "--trials", "2", "--proxy-epochs", EPOCHS, "-q", "--storage", url)
    assert main([*arguments, "--maximize", "accuracy"]) == 2
    assert "was begun with maximize None, not 'accuracy'" in only_line(capsys)


def test_a_read_only_database_is_one_line(mistake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///file:{mistake / 'study.db'}?mode=ro&uri=true"
    arguments = command(mistake / "out", "--trials", "2", "--proxy-epochs", EPOCHS, "-q", "--storage", url)
    assert main(arguments) == 2
    assert "readonly" in only_line(capsys)


def test_a_new_study_keeps_the_old_one(mistake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{mistake / 'study.db'}"
    before = trials(url)
    arguments = command(mistake / "out", "--trials", "1", "--storage", url, "-q", "--proxy-epochs", "2")
    assert main(arguments) == 2
    assert "start over with --new-study" in only_line(capsys)
    assert main([*arguments, "--new-study"]) == 0
    (kept,) = [name for name in optuna.get_all_study_names(url) if name != NAME]
    old = optuna.load_study(study_name=kept, storage=url).get_trials()
    assert [trial.user_attrs for trial in old] == [trial.user_attrs for trial in before]
    assert "--new-study" not in str(optuna.load_study(study_name=NAME, storage=url).user_attrs["nas_kd kit"])
