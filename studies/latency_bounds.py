"""Whether a bound on latency is kept: short studies of many bases, and what they export timed again elsewhere.

    python studies/latency_bounds.py [MODEL …] [--bounds 50% 33%] [--img-size 128] [--out DIR]

For each base and bound a study of two trials on digits runs to its end with the defaults of `nas_kd.study`; its front's
ONNX files are then timed beside its teacher's by a second process. A row per study: how many models came out, what
they take as a share of the teacher (the slowest), and whether that is within the bound and 5 %. A study whose rows are
in DIR is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
from paper_tables import hardware

import nas_kd.models  # noqa: F401  # exports load by their networks
from nas_kd.networks.onnx import write_model

MODELS = (
    "resnet18 resnet50 mobilenetv2_100 tf_efficientnet_lite0 mobilenetv3_small_100 regnetx_002 mobileone_s1"
).split()
SHORT = (
    "--trials 2 --train-images 60 --teacher-epochs 1 --proxy-epochs 1 --refine-epochs 1 --front 2 --views 1"
    " --library-budget 0 --in-chans 1 -q"
).split()
COLUMNS = ("base", "bound", "front models", "params ÷", "slowest / teacher", "within 5 %", "s")
SLACK = 1.05


def study(model: str, bound: str, side: int, out: Path) -> str:
    """Runs a study; empty, or the line that it was refused with."""
    command = [sys.executable, "-m", "nas_kd.study", "--model", model, "--budget", f"latency={bound}"]
    done = subprocess.run(
        [*command, "--img-size", str(side), "--out", str(out), *SHORT], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]


def timed_again(out: Path, side: int) -> tuple[list[float], float]:
    """The front's latencies as shares of the teacher's, by a process of its own, and the least gain in params."""
    rows = list(csv.DictReader((out / "front.csv").open(encoding="utf-8")))
    teacher = next(row for row in rows if row["role"] == "teacher")
    files = [out / row["path"] / "model.onnx" for row in rows if row["role"] == "front"]
    reference = out / "teacher.onnx"
    network = timm.create_model(f"local-dir:{out / teacher['path']}", pretrained=True).eval()
    write_model(network, (1, side, side), reference)
    command = [sys.executable, str(Path(__file__).parent / "timed_files.py"), str(reference), *map(str, files)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    gains = [int(teacher["params"]) / int(row["params"]) for row in rows if row["role"] == "front"]
    return json.loads(answer.stdout)["ratios"], min(gains)


def row(model: str, bound: str, side: int, folder: Path) -> list[str]:
    """One line of the table, kept in a file."""
    out = folder / f"{model}-{bound.rstrip('%')}-{side}"
    kept = out / "row.json"
    if not kept.exists():
        started = time.perf_counter()
        refused = study(model, bound, side, out)
        if refused:
            cells = [model, bound, "0", "–", "–", refused, f"{time.perf_counter() - started:.0f}"]
        else:
            ratios, gain = timed_again(out, side)
            within = max(ratios) <= SLACK * float(bound.rstrip("%")) / 100
            seconds = f"{time.perf_counter() - started:.0f}"
            cells = [model, bound, str(len(ratios)), f"{gain:.1f}", f"{max(ratios):.3f}", "yes" if within else "NO"]
            cells.append(seconds)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(cells))
    return json.loads(kept.read_text())


def table(models: Sequence[str], bounds: Sequence[str], side: int, folder: Path) -> Iterator[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    for model in models:
        for bound in bounds:
            yield f"| {' | '.join(row(model, bound, side, folder))} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--bounds", nargs="+", default=["50%", "33%"])
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("results/latency_bounds"))
    arguments = parser.parse_args(argv)
    print(f"*{hardware()}; one thread, one image of {arguments.img_size} pixels*\n")
    for line in table(arguments.models, arguments.bounds, arguments.img_size, arguments.out):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
