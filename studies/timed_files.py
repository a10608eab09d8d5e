"""Times ONNX files beside a reference, in a process that has nothing else: `python timed_files.py REFERENCE FILE …`

Prints a JSON object: the milliseconds of the reference and each file's ratio to it; medians of turns, one thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
import onnxruntime

TURNS, RUNS = 31, 5


def session(path: str) -> onnxruntime.InferenceSession:
    """One thread, every optimisation of the graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def timed(paths: Sequence[str]) -> list[list[float]]:
    """The milliseconds of each file at each turn: the least of some runs, after one that is not timed."""
    sessions = [session(path) for path in paths]
    shape = [1, *sessions[0].get_inputs()[0].shape[1:]]
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rows: list[list[float]] = [[] for _ in paths]
    for _ in range(TURNS):
        for row, own in zip(rows, sessions, strict=True):
            feed = {own.get_inputs()[0].name: image}
            own.run(None, feed)
            row.append(min(_seconds(own, feed) for _ in range(RUNS)) * 1000)
    return rows


def _seconds(own: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> float:
    started = time.perf_counter()
    own.run(None, feed)
    return time.perf_counter() - started


def main(argv: Sequence[str]) -> int:
    reference, *others = timed(argv)
    ratios = [statistics.median(own / base for own, base in zip(row, reference, strict=True)) for row in others]
    print(json.dumps({"ms": statistics.median(reference), "ratios": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
