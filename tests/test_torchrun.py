"""Commands over several processes: one is killed, and the same command goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
from processes import end_of, start_ranks
from safetensors.torch import load_file
from warm import warm_python

from nas_kd.arguments.torchrun import is_rank, refuse_jobs
from nas_kd.errors import NasKdError

COMMAND = "nas_kd.distill test_resnet --no-teacher --img-size 32 --train-images 120 --epochs 6 --batch-size 32"
# the command, whose second process is killed as its fourth epoch begins
KILLED = """
import os, signal, sys
from nas_kd.distill import main
from nas_kd.training import loop

run_epoch = loop._run_epoch

def run(stepper, data, epoch):
    if (epoch, os.environ["RANK"]) == (3, "1"):
        os.kill(os.getpid(), signal.SIGKILL)
    return run_epoch(stepper, data, epoch)

loop._run_epoch = run
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_process_ends_the_others_and_the_command_goes_on(tmp_path: Path) -> None:
    arguments = [*COMMAND.split(), "--out", str(tmp_path / "out")]
    (said, code), (_, killed) = map(end_of, start_ranks([warm_python(), "-c", KILLED, *arguments[1:], "-q"]))
    assert re.fullmatch(r"nas_kd: another process of this training has ended: .*\n", said), said
    assert (code, killed) == (2, -signal.SIGKILL)
    assert list(tmp_path.glob("out/cache/*.resume"))

    torchrun = [warm_python(), "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *arguments, "--debug"]
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
