"""optuna-dashboard shows a finished run: its trials, a note, the true front, and the finalists' files."""

from __future__ import annotations

import csv
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import optuna
import pytest
from browser import CHROMIUM, browse

from nas_kd.search.artifacts import open_store
from nas_kd.search.dashboard import attach, show_note, show_plot
from nas_kd.study import main

COMMAND = "--model test_resnet --img-size 32 --teacher-epochs 1 --proxy-epochs 1 --refine-epochs 1 --train-images 60"
COMMAND += " --library-budget 0 --no-base-bounds --no-search-stages --space width=0.5/1"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("dashboard") / "run"
    arguments = f"{COMMAND} --budget params=50% --trials 2 --front 2 --study-name shown --no-onnx --out {out} -q"
    assert main(arguments.split()) == 0
    return out


@pytest.fixture(scope="module")
def address(out: Path) -> Iterator[str]:
    """The address of a dashboard on its database, started as the run's last line says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
    shown = [f"sqlite:///{out / 'study.db'}", "--artifact-dir", str(out / "artifacts")]
    process = subprocess.Popen(
        [sys.executable, "-c", start, *shown, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(120)


def fetch(url: str) -> Any:
    """The JSON at an address."""
    return json.loads(fetch_bytes(url)[0])


def fetch_bytes(url: str, patience: float = 600) -> tuple[bytes, str]:
    """What is at an address, once somebody answers, and of which kind it is."""
    deadline = time.monotonic() + patience
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(url, timeout=120) as answer:
                return answer.read(), answer.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            error.close()
            raise
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.fixture(scope="module")
def detail(address: str) -> dict[str, Any]:
    """All that the dashboard shows of the study."""
    (study,) = fetch(f"{address}/api/studies")["study_summaries"]
    assert study["study_name"] == "shown"
    shown: dict[str, Any] = fetch(f"{address}/api/studies/{study['study_id']}?after=0")
    return {**shown, "study_id": study["study_id"]}


def models(out: Path) -> list[dict[str, str]]:
    with (out / "front.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_serves_the_study_and_its_trials(detail: dict[str, Any]) -> None:
    assert detail["name"] == "shown"
    complete = [trial for trial in detail["trials"] if trial["state"] == "Complete"]
    assert len(complete) == 2
    assert all(len(trial["values"]) == 3 for trial in complete)
    assert detail["objective_names"] == ["accuracy", "params", "macs"]


_TEST = 359  # test images of the digits
_PATIENCE = 300  # seconds: against hangs


def test_the_note_has_the_command_and_every_model(out: Path, detail: dict[str, Any]) -> None:
    note = detail["note"]["body"]
    assert "python -m nas_kd.study --model test_resnet" in note
    for row in models(out):
        right = round(float(row["test_accuracy"]) * _TEST)  # the table holds a rounded share of them
        shown = f"{100 * right / _TEST:.1f}"
        assert re.search(rf"^\| {re.escape(row['model'])} \| {row['role']} \| .*\| {shown} \|", note, re.MULTILINE)
    assert note.startswith("**test_resnet")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: .ci/run installs it")
def test_a_browser_shows_the_note_and_the_front(
    out: Path, address: str, detail: dict[str, Any], tmp_path: Path
) -> None:
    best = next(row["model"] for row in models(out) if row["role"] == "front")
    pages = {
        "note": f"document.body.innerText.includes({best!r})",
        "": "document.querySelectorAll('.js-plotly-plot')[0]",
    }
    with browse(tmp_path) as tab:
        for page, is_there in pages.items():
            tab.open(f"{address}/dashboard/studies/{detail['study_id']}/{page}", width=1280)
            tab.until(f"{is_there} || performance.now() > {1000 * _PATIENCE}")
            assert tab.see(f"Boolean({is_there})"), tab.see("document.body.innerText")


def test_the_front_is_among_the_plots(out: Path, detail: dict[str, Any]) -> None:
    plots = {plot["id"]: json.loads(plot["graph_object"]) for plot in detail["plotly_graph_objects"]}
    assert plots.keys() == {"front-params", "front-macs"}
    (front,) = [trace for trace in plots["front-params"]["data"] if trace["name"] == "front"]
    members = [row for row in models(out) if row["role"] == "front"]
    assert sorted(front["x"]) == sorted(int(row["params"]) for row in members)


def test_finalists_have_their_models_and_pictures(out: Path, address: str, detail: dict[str, Any]) -> None:
    members = {row["digest"]: row for row in models(out) if row["role"] == "front"}
    finalists = [trial for trial in detail["trials"] if trial["artifacts"]]
    assert len(finalists) == len(members)
    for trial in finalists:
        digest = next(item["value"] for item in trial["user_attrs"] if item["key"] == "digest")
        files = {meta["filename"]: meta["artifact_id"] for meta in trial["artifacts"]}
        assert files.keys() == {"model.safetensors", "config.json", "blocks.svg"}
        path = f"{address}/artifacts/{detail['study_id']}/{trial['trial_id']}"
        weights, _ = fetch_bytes(f"{path}/{files['model.safetensors']}")
        assert weights == (out / members[digest]["path"] / "model.safetensors").read_bytes()
        picture, kind = fetch_bytes(f"{path}/{files['blocks.svg']}")
        assert kind == "image/svg+xml"
        root = ElementTree.fromstring(picture)
        texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert members[digest]["model"] in texts
        assert "layer1.0" in texts


def test_what_is_attached_again_replaces_what_there_was(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "run")
    study = optuna.load_study(study_name="shown", storage=f"sqlite:///{copy / 'study.db'}")
    trial, store = study.trials[0], open_store(str(copy / "artifacts"))

    def files() -> list[str]:
        attributes = study._storage.get_study_system_attrs(study._study_id)
        metas = [
            json.loads(v) for k, v in attributes.items() if k.startswith(f"dashboard:artifacts:{trial._trial_id}:")
        ]
        return [meta["filename"] for meta in metas if meta]

    before = files()
    for content in ("first", "second", "second"):
        (tmp_path / "notes.md").write_text(content)
        attach(study, trial, tmp_path / "notes.md", store)
    assert sorted(files()) == sorted([*before, "notes.md"])


def test_without_the_dashboard_the_note_is_an_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    study = optuna.create_study()
    show_note(study, "what there is to say")
    show_plot(study, "front", None)
    assert study.user_attrs == {"note": "what there is to say"}
