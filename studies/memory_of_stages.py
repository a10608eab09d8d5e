"""What each stage of a study takes of the memory: runs a study in this process (Linux) and prints a row per stage.

    python studies/memory_of_stages.py --model tf_efficientnet_lite0 --pretrained --data-dir photos --img-size 160
        --budget macs=50% --teacher-epochs 1 --views 1 --trials 1 --proxy-epochs 1 --refine-epochs 1 --front 1

The arguments are those of `nas-kd study`. What a step takes does not depend on how many there are. `own` is the peak of
memory that is no file's, looked at 50 times a second; `libraries` what is mapped of files other than arrays of images
at the stage's end; images lie in mapped arrays and count in neither. MiB; Markdown. Of the models of the results those
that a process beside this one trains are not seen: one thread (OMP_NUM_THREADS=1) trains all here.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from nas_kd import progress
from nas_kd.study import main as study

LOOKS = 50  # a second


class Watch(threading.Thread):
    """Looks at what this process takes; `peak` is the most since it was last set, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, taken("RssAnon"))
            time.sleep(1 / LOOKS)

    def watching(self, show: Callable[..., AbstractContextManager[Any]]) -> Callable[..., AbstractContextManager[Any]]:
        """A method of `Stages` that shows a stage, and then says what it took."""

        @contextmanager
        def watched(stages: progress.Stages, name: str, total: float = 1) -> Iterator[Any]:
            self.peak = 0
            with show(stages, name, total) as advance:
                yield advance
            libraries = taken("RssFile") - mapped_images()
            print(f"| {name} | {self.peak} | {libraries} | {self.peak + libraries} |", flush=True)

        return watched


def taken(kind: str) -> int:
    """What this process takes of a kind of memory, in MiB."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) >> 10


def mapped_images() -> int:
    """What is resident of mapped arrays, in MiB."""
    smaps = Path("/proc/self/smaps").read_text()
    entries = re.findall(r"^[0-9a-f]+-[0-9a-f]+ .*\.npy\n(?:.*\n)*?Rss:\s+(\d+) kB", smaps, flags=re.MULTILINE)
    return sum(map(int, entries)) >> 10


def main() -> int:
    watch = Watch()
    watch.start()
    for name in ("stage", "board"):
        setattr(progress.Stages, name, watch.watching(getattr(progress.Stages, name)))
    print("| stage | own, peak | libraries | together |\n|---|---|---|---|")
    return study(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
