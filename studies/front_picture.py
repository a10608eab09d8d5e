"""Draws the front of a finished study, as in the README: accuracy over parameters, from its `front.csv`.

python -m nas_kd.study --budget params=1M
python studies/front_picture.py results/resnet18-digits-params1M docs/front.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from nas_kd.results.front import read_front_csv

STYLE = {
    "front": ("o", "#0969da", "students of the front"),
    "uniform": ("s", "#9a6700", "one width everywhere"),
    "random": ("^", "#8250df", "a random student"),
    "no teacher": ("v", "#cf222e", "from scratch, without a teacher"),
    "teacher": ("*", "#1a7f37", "teacher"),
}


def main(folder: str, target: str) -> None:
    plt.rcParams.update({"svg.hashsalt": "nas_kd", "font.size": 11})
    figure, axes = plt.subplots(figsize=(8, 4.2))
    models = read_front_csv(Path(folder, "front.csv"))
    for role, (marker, colour, label) in STYLE.items():
        rows = sorted((m for m in models if m.role == role), key=lambda m: m.cost.params)
        sizes, accuracies = [m.cost.params / 1e6 for m in rows], [100 * (m.test_accuracy or 0) for m in rows]
        if rows:  # a line would suggest more than 359 test images can tell
            axes.plot(sizes, accuracies, linestyle="", marker=marker, color=colour, label=label, markersize=9)
    low, high = axes.get_ylim()
    axes.set_ylim(low - max(1.0, high - low), min(100.0, high + 0.3))
    axes.axvline(1, color="#57606a", linestyle=":", linewidth=1.2)
    axes.text(1.03, axes.get_ylim()[0], " budget: 1 M parameters", color="#57606a", va="bottom")
    axes.set_xscale("log")
    axes.set_xticks([0.3, 0.5, 1, 2, 5, 10], ["0.3 M", "0.5 M", "1 M", "2 M", "5 M", "10 M"])
    axes.minorticks_off()
    axes.set_xlabel("parameters")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
