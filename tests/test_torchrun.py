"""Commands over several processes: one is killed, and the same command goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import end_of, start_ranks
from safetensors.torch import load_file

from nas_kd.arguments.torchrun import is_rank, refuse_jobs
from nas_kd.errors import NasKdError

# epochs: what is left of the training after its first state is longer than any pause of the test
COMMAND = "nas_kd.distill test_resnet --no-teacher --img-size 32 --train-images 120 --epochs 30 --batch-size 32"


def test_a_killed_process_ends_the_others_and_the_command_goes_on(tmp_path: Path) -> None:
    arguments = [*COMMAND.split(), "--out", str(tmp_path / "out")]
    first, second = ranks = start_ranks([sys.executable, "-m", *arguments, "-q"])
    while not list(tmp_path.glob("out/cache/*.resume")):
        assert all(process.poll() is None for process in ranks)
        time.sleep(0.05)  # until there is something to lose
    second.kill()
    said, code = end_of(first)
    assert (len(said.splitlines()), code) == (1, 2)
    assert "another process of this training has ended" in said
    end_of(second)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *arguments, "--debug"]
    done = subprocess.run(torchrun, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resumed refined-\w+\.resume after epoch [1-9]", done.stderr), done.stderr
    record = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert load_file(tmp_path / "out" / record["path"] / "model.safetensors")
    assert not list(tmp_path.glob("out/cache/*.resume"))


def test_workers_beside_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_jobs(2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        assert not is_rank()
        monkeypatch.setenv(name, "2")
    refuse_jobs(1)
    with pytest.raises(NasKdError, match="torchrun shares out each training"):
        refuse_jobs(2)
