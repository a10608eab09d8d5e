"""What a study's models are beside their teacher, on paper and on the clock, with what they were before.

    python -m nas_kd.study --budget params=1M
    python studies/speed.py [--results results/resnet18-digits-params1M]

Times every model of a finished study beside its teacher, in torch and in ONNX Runtime (one thread, one image), each
turn by turn in one process, and the cheapest genotypes (by MACs) of two spaces of an EfficientNet-Lite0 at 128 pixels:
the default one, and the one that was the default before 2026-11-26. Every cell is the teacher's or base's amount
divided by the model's. "Before" are the figures of 2026-11-26, taken in the same way before the defaults changed.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import timm
from paper_tables import hardware
from torch import nn

import nas_kd.models  # noqa: F401  # exports load by their networks
from nas_kd.arguments.choices import ChoicesSettings
from nas_kd.costs.latency import measure_together
from nas_kd.networks.onnx import write_model
from nas_kd.search.options import parse_options
from nas_kd.search.space import Space

KINDS = ("params", "MACs", "torch", "ONNX Runtime", "peak memory")
BEFORE = {
    "digits, front": ("23–33", "10–25", "1.1–1.4", "0.8–1.2", "0.6–0.8"),
    "digits, one width everywhere": ("16", "15", "3.1", "14.5", "4"),
    "EfficientNet-Lite0 at 128, cheapest": ("10.7", "9.9", "1.6", "1.35", "6"),
}
Gains = Mapping[str, float]


def beside(reference: nn.Module, networks: Mapping[str, nn.Module], size: tuple[int, int, int]) -> dict[str, Gains]:
    """How many times faster than the reference each network is, by runtime."""
    times = measure_together({"reference": reference, **networks}, size, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.onnx") for number in range(1 + len(networks))]
        for path, network in zip(files, (reference, *networks.values()), strict=True):
            write_model(network.eval(), size, path)
        command = [sys.executable, str(Path(__file__).parent / "timed_files.py"), *map(str, files)]
        ratios = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["ratios"]
    return {
        name: {"torch": times["reference"] / times[name], "ONNX Runtime": 1 / ratio}
        for name, ratio in zip(networks, ratios, strict=True)
    }


def of_study(folder: Path) -> tuple[dict[str, Gains], dict[str, list[str]]]:
    """The gains of every model of a study but its teacher, and the names by role."""
    rows = list(csv.DictReader((folder / "front.csv").open(encoding="utf-8")))
    networks = {row["model"]: timm.create_model(f"local-dir:{folder / row['path']}", pretrained=True) for row in rows}
    (teacher,) = [row for row in rows if row["role"] == "teacher"]
    others = [row for row in rows if row["role"] != "teacher"]
    size = timm.data.resolve_model_data_config(networks[teacher["model"]])["input_size"]
    clock = beside(networks[teacher["model"]], {row["model"]: networks[row["model"]] for row in others}, size)
    columns = {"params": "params", "macs": "MACs", "peak_memory": "peak memory"}
    paper = {
        row["model"]: {name: int(teacher[column]) / int(row[column]) for column, name in columns.items()}
        for row in others
    }
    roles: dict[str, list[str]] = {}
    for row in others:
        roles.setdefault(row["role"], []).append(row["model"])
    return {name: {**paper[name], **clock[name]} for name in paper}, roles


def cheapest(space_text: str, *, stages: bool) -> Gains:
    """The gains of the genotype with the fewest MACs."""
    base = timm.create_model("tf_efficientnet_lite0", num_classes=10).eval()
    space = Space(base, img_size=128, options=parse_options(space_text, search_stages=stages))
    genotype = space.table.cheapest("macs")
    now, own = space.base_cost(), space.cost(genotype)
    clock = beside(base, {"cheapest": space.student(genotype)}, (3, 128, 128))["cheapest"]
    paper = {"params": now.params / own.params, "MACs": now.macs / own.macs}
    return {**paper, "peak memory": now.peak_memory / own.peak_memory, **clock}


def spread(gains: Sequence[Gains]) -> tuple[str, ...]:
    """Each kind of gain from the least to the most."""
    cells = [(min(one[kind] for one in gains), max(one[kind] for one in gains)) for kind in KINDS]
    return tuple(f"{low:.3g}" if low == high else f"{low:.3g}–{high:.3g}" for low, high in cells)


def table(folder: Path) -> Iterator[str]:
    yield f"| ÷ beside teacher or base | | {' | '.join(KINDS)} |"
    yield f"|{'---|' * (2 + len(KINDS))}"
    gains, roles, usual = *of_study(folder), ChoicesSettings()
    now = {
        "digits, front": spread([gains[name] for name in roles["front"]]),
        "digits, one width everywhere": spread([gains[name] for name in roles.get("uniform", [])]),
        "EfficientNet-Lite0 at 128, cheapest": spread([cheapest(usual.space, stages=usual.search_stages)]),
    }
    for name, cells in now.items():
        yield f"| {name} | before | {' | '.join(BEFORE[name])} |"
        yield f"| | now | {' | '.join(cells)} |"
    before = spread([cheapest("width,kernel,conv", stages=False)])
    yield f"| EfficientNet-Lite0 at 128, the space of before | now | {' | '.join(before)} |"
    yield ""
    yield f"| model of the front | {' | '.join(KINDS)} |"
    yield f"|{'---|' * (1 + len(KINDS))}"
    for name in roles["front"]:
        yield f"| {name} | {' | '.join(spread([gains[name]]))} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/resnet18-digits-params1M"))
    arguments = parser.parse_args(argv)
    print(f"*{datetime.date.today()}, {hardware()}, one thread, one image*\n")
    for line in table(arguments.results):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
