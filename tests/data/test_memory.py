"""What the C library keeps of freed memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KEPT = """
import re, resource
import numpy as np
from pathlib import Path
from nas_kd.data.memory import give_back, keep_some

def fetched():
    blocks = [np.ones(1 << 20) for _ in range(8)]  # 8 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

keep_some()
fetched()
before = fetched()
again, kept = fetched() - before, resident()
give_back()
print(again, kept - resident())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("mine", [{}, {"MALLOC_ARENA_MAX": "2"}], ids=["ours", "the user's"])
def test_what_a_step_frees_serves_the_next_until_it_is_given_back(mine: dict[str, str]) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | mine
    command = [sys.executable, "-c", KEPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    pages, mebibytes = map(int, done.stdout.split())
    assert (pages < 1_000) == (mebibytes > 48) == (not mine)
