"""The page and the picture of studies/versus.py, from the rows of all pairs in its output folder.

python studies/versus_page.py results/versus docs/results/versus.md
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch

matplotlib.use("svg")
import matplotlib.pyplot as plt
from versus_arms import FASTNAS, PLAIN, TIMM

from nas_kd.budget import LATENCY
from nas_kd.files.records import Records

Row = dict[str, Any]
MS = "ms"
COLUMNS = (
    "arm",
    "test",
    "seeds",
    MS,
    "MACs",
    "params",
    "lr",
    "images",
    "library s",
    "search s",
    "training s",
    "total s",
)
NOTES = """Test accuracy in %, mean ± standard deviation over seeds (one run where there is none). Seconds are CPU time
on one core: of the library, of what else comes before the training (trials, pruning, another search), of the training,
and all together. What every arm needs is not in them: the teacher, and its logits on the augmented images. At equal
compute the number of images follows from the speed of the arm's run with equal images; the machine was shared, so the
time that was then taken is somewhat off.

All arms: the same teacher, augmented images and logits; batches of 64, SGD with Nesterov momentum, one cycle, T = 4,
distill weight 0.9. `knapsack`: the integer programme on the damages of the library of block choices, no trials.
`search`: trials after that (`--maximize accuracy`), the best refined. `small`: a library of fewer choices, closed
forms alone. `torch-pruning`: 50 rounds; `inner` leaves residual streams as they are, `whole` narrows them; `multiples`
are of channels, by its own `round_to`: a runtime computes 8 or 16 at once, and is slow for odd widths. `ModelOpt
FastNAS`: widths in steps of 4 channels, scored on 1,000 validation images. `timm …/16`: a small model of timm's with
fresh weights, its first strides reduced to that total stride: no pretrained weights of them were at hand. `Optuna and
timm alone`: `studies/plain_optuna.py`, fresh weights. Both learn by timm's `LogitDistillationTask`."""
STYLES = (
    ("ours", "o", "#0969da"),
    ("torch-pruning", "s", "#9a6700"),
    (FASTNAS, "D", "#8250df"),
    ("small models of timm's", "^", "#57606a"),
    (PLAIN, "v", "#cf222e"),
    ("teacher", "*", "#1a7f37"),
)


def write_page(folder: Path, page: Path) -> None:
    """Writes page and picture from the pairs whose rows are in `folder`."""
    pairs = [read_pair(path.parent) for path in sorted(folder.glob("*/rows.jsonl"))]
    pairs = [pair for pair in pairs if pair["rows"]]
    if pairs:
        page.write_text("\n".join(lines(pairs, page.with_suffix(".svg").name)) + "\n", encoding="utf-8")
        draw(pairs, page.with_suffix(".svg"))


def read_pair(folder: Path) -> Row:
    """What is known of a pair, with its `rows` at the learning rates that were chosen, and its `teacher`."""
    text = (folder / "rows.jsonl").read_text(encoding="utf-8")
    records = Records(folder / "rows.jsonl", latest=True)
    keys = dict.fromkeys(line.split('"')[3] for line in text.splitlines() if line.startswith('{"key":"row '))
    if "pair" not in records:
        return {"rows": []}
    pair = records["pair"]
    rows = [records[key] for key in keys if key in records]
    chosen = [row for row in rows if row["lr"] == pair["rates"].get(row["arm"], row["lr"])]
    return {**pair, "rows": chosen, "tried": rows, "teacher": records["the base, the teacher"]}


def total(row: Row) -> float:
    return row["library"] + row["other"] + row["training"]


def is_ours(row: Row) -> bool:
    return row["arm"].startswith(("knapsack", "search"))


def lines(pairs: Sequence[Row], picture: str) -> Iterator[str]:
    """The page, as Markdown."""
    yield "# Our students beside the peers'\n"
    versions = ", ".join(f"{name} {version(name)}" for name in ("optuna", "torch-pruning"))
    yield (
        f"{datetime.date.today()}, {platform.machine()}, one thread of a shared machine, torch {torch.__version__}, "
        f"timm {timm.__version__}, {versions}; ModelOpt 0.47.\n"
    )
    yield f"{NOTES}\n\n![Test accuracy over MACs, params and CPU seconds]({picture})"
    for pair in pairs:
        yield from pair_lines(pair)


def pair_lines(pair: Row) -> Iterator[str]:
    teacher = pair["teacher"]
    yield f"\n## {pair['title']}\n\n`{pair['command']}`: `{pair['study']}`\n"
    yield (
        f"The base, which is the teacher: {100 * teacher['test']:.2f} % test accuracy, {teacher['macs'] / 1e6:.2f} M "
        f"MACs, {teacher['params']:,} params. The bound: {bound_of(pair)}."
        + (f" {pair['train']:,} images to train on." if "train" in pair else "")  # rows of before do not say
    )
    for seconds in sorted({row["total"] for row in pair["rows"]}):
        rows = [row for row in pair["rows"] if row["total"] == seconds]
        if seconds:
            yield f"\n### At equal compute: {seconds} CPU seconds together\n"
        else:
            yield f"\n### After {rows[0]['images']:,} images of distillation\n"
        yield from table(rows)
    for arm in pair.get("beyond", ()):
        yield f"\n`{arm}` does not get within the bound."
    yield from tried(pair)


def bound_of(pair: Row) -> str:
    """In words; rows of before bound MACs."""
    if bounded(pair) == LATENCY:
        base = milliseconds(pair["teacher"][LATENCY])
        return f"{milliseconds(pair['bound'])} of its {base} ms in ONNX Runtime, one image on one thread"
    return f"{pair['bound']:,.0f} params" if bounded(pair) == "params" else f"{pair['bound'] / 1e6:.2f} M MACs"


def milliseconds(nanoseconds: float) -> str:
    """As the table shows them; rows of before know of none."""
    return f"{nanoseconds / 1e6:.3f}" if nanoseconds else ""


def bounded(pair: Row) -> str:
    return str(pair.get("bounded", "macs"))


def table(rows: Sequence[Row]) -> Iterator[str]:
    columns = [name for name in COLUMNS if name != MS or any(row.get(LATENCY) for row in rows)]
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["arm"], []).append(row)
    ordered = sorted(groups.values(), key=lambda group: -mean(group, "test"))
    yield from (line(group, timed=MS in columns) for group in ordered)
    ours = [group for group in ordered if is_ours(group[0])]
    others = [group for group in ordered if not is_ours(group[0])]
    if ours and others:
        lead = 100 * (mean(ours[0], "test") - mean(others[0], "test"))
        yield f"\n`{ours[0][0]['arm']}` is {lead:+.2f} points from the best peer, `{others[0][0]['arm']}`."


def line(group: Sequence[Row], *, timed: bool) -> str:
    spread = f" ± {100 * statistics.stdev(row['test'] for row in group):.2f}" if len(group) > 1 else ""
    first = group[0]
    cells = [first["arm"], f"{100 * mean(group, 'test'):.2f}{spread}", len(group)]
    cells += [milliseconds(first.get(LATENCY, 0))] if timed else []
    cells += [
        f"{first['macs'] / 1e6:.2f} M",
        f"{first['params']:,}",
        f"{first['lr']:.3g}",
        f"{mean(group, 'images'):,.0f}",
    ]
    cells += [f"{mean(group, part):.0f}" for part in ("library", "other", "training")]
    return f"| {' | '.join(map(str, cells))} | {statistics.mean(map(total, group)):.0f} |"


def mean(group: Sequence[Row], name: str) -> float:
    return statistics.mean(row[name] for row in group)


def tried(pair: Row) -> Iterator[str]:
    """The learning rates among which validation accuracy chose."""
    arms = dict.fromkeys(row["arm"] for row in pair["tried"] if row not in pair["rows"])
    for arm in arms:
        rows = [row for row in pair["tried"] if (row["arm"], row["seed"], row["total"]) == (arm, 0, 0)]
        found = ", ".join(f"{row['lr']:g}: {100 * row['val']:.2f}" for row in sorted(rows, key=lambda row: row["lr"]))
        yield f"\nValidation accuracy in % of `{arm}` by learning rate: {found}."


def draw(pairs: Sequence[Row], path: Path) -> None:
    """Accuracy over MACs (or ms, where they are the bound), params and CPU seconds; at equal compute hollow."""
    plt.rcParams.update({"svg.hashsalt": "nas_kd", "font.size": 10})
    shared = ("params", "params in M", 1e6), ("seconds", "CPU seconds in all", 1)
    figure, grid = plt.subplots(len(pairs), 3, figsize=(12, 3.6 * len(pairs)), sharey="row", squeeze=False)
    for pair, row_of_axes in zip(pairs, grid, strict=True):
        teacher = {**pair["teacher"], "arm": "teacher", "total": 0}
        rows = [{**row, "seconds": total(row)} for row in pair["rows"]]
        timed = bounded(pair) == LATENCY
        axes_of = ((LATENCY, "ms", 1e6) if timed else ("macs", "MACs in M", 1e6), *shared)
        for axes, (name, label, unit) in zip(row_of_axes, axes_of, strict=True):
            for row in [*rows, *([teacher] if name != "seconds" else [])]:
                _, marker, colour = style(row["arm"])
                fill = "none" if row["total"] else colour
                axes.plot(row[name] / unit, 100 * row["test"], marker, color=colour, markerfacecolor=fill)
            if name == bounded(pair):
                axes.axvline(pair["bound"] / unit, color="#57606a", linestyle=":", linewidth=1.2)
            if name not in ("macs", LATENCY):
                spread_out(axes)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        row_of_axes[0].set_ylabel("test accuracy in %")
        row_of_axes[0].set_title(pair["title"], loc="left", fontsize=10)
    handles = [plt.Line2D([], [], linestyle="", marker=marker, color=colour) for _, marker, colour in STYLES]
    hollow = plt.Line2D([], [], linestyle="", marker="o", color="black", markerfacecolor="none")
    names = [*(name for name, _, _ in STYLES), "hollow: at equal compute"]
    figure.legend([*handles, hollow], names, ncols=4, loc="upper center", fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / (3.6 * len(pairs))))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def spread_out(axes: Any) -> None:
    """A logarithmic axis that is labelled with plain numbers."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [number * 10.0**power for power in range(-3, 5) for number in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def style(arm: str) -> tuple[str, str, str]:
    kind = "ours" if is_ours({"arm": arm}) else "small models of timm's" if arm.startswith(TIMM) else arm
    return next(entry for entry in STYLES if kind.startswith(entry[0]))


if __name__ == "__main__":
    write_page(Path(sys.argv[1]), Path(sys.argv[2]))
