"""optuna-dashboard shows a finished run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas_kd.study import main

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a dashboard on the database of a finished run."""
    out = tmp_path / "run"
    small = "--model test_resnet --img-size 32 --teacher-epochs 1 --proxy-epochs 1 --refine-epochs 1 --train-images 60"
    assert (
        main([*small.split(), *f"--budget params=50% --trials 2 --front 2 --study-name shown --out {out} -q".split()])
        == 0
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", start, f"sqlite:///{out / 'study.db'}", "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


def fetch(url: str, patience: float = 40) -> Any:
    """The JSON at an address, once somebody answers."""
    deadline = time.monotonic() + patience
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(url, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            raise
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_it_serves_the_study_and_its_trials(address: str) -> None:
    (study,) = fetch(f"{address}/api/studies")["study_summaries"]
    assert study["study_name"] == "shown"
    detail = fetch(f"{address}/api/studies/{study['study_id']}?after=0")
    assert detail["name"] == "shown"
    complete = [trial for trial in detail["trials"] if trial["state"] == "Complete"]
    assert len(complete) == 2
    assert all(len(trial["values"]) == 3 for trial in complete)
    assert detail["objective_names"] == ["accuracy", "params", "macs"]
