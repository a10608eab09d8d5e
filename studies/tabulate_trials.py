"""A tabulated truth: every genotype of a small space within a budget, trained once on real images as a trial would be.

    python studies/tabulate_trials.py --data-dir DIR      # a minute for the teacher, then 2 s per genotype

The space is a ResNet of five blocks with three to six choices each on Fashion-MNIST (DIR holds FashionMNIST/raw); all
of its genotypes within the budget are trained, so that what a search proposes can be looked up and nothing is
interpolated. Unlike a trial, a student is looked at with its running averages, not recalibrated. A killed run goes on
where it was. `studies/samplers.py` compares samplers on the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from optuna.storages import InMemoryStorage
from torch import nn

from nas_kd.arguments.study import parse_study
from nas_kd.files.records import Record, Records
from nas_kd.preparation.job import Job, prepare, proxy_recipe_of
from nas_kd.preparation.materials import Materials, gather
from nas_kd.progress import Stages, console_for
from nas_kd.search.rungs import rung_epochs
from nas_kd.search.space import Space
from nas_kd.search.trials import Proxy
from nas_kd.training.loop import train

STUDY = (
    "--model test_resnet --img-size 32 --in-chans 1 --dataset torch/fashion_mnist --budget params=6%,macs=30% "
    "--train-images 12000 --proxy-images 1000 --proxy-epochs 4 --teacher-epochs 8 --refine-epochs 1 --trials 120 "
    "--library-budget 0.3 --no-search-stages --no-base-bounds "
    "--space width=1/0.375/0.25/0.125,conv=standard/depthwise --pin conv1:conv=standard "
    "--pin conv1:width=1/0.5/0.25 --pin layer1.0:width=1/0.25 --pin layer2.0:width=1/0.375/0.125 "
    "--pin layer3.0:width=1/0.375/0.125 --pin layer4.0:width=1/0.375/0.125"
)


def within(space: Space[nn.Module]) -> NDArray[np.int64]:
    """All genotypes within the space's budget, N × blocks positions of choices; those with fewer MACs first, so that of
    a run that is cut short a narrower budget is whole."""
    rows = np.array(list(itertools.product(*(range(len(block.choices)) for block in space.blocks))), dtype=np.int64)
    assert space.budget is not None
    costs = space.table.many(rows, space.budget)
    rows = rows[np.all([costs[kind] <= bound for kind, bound in space.budget.items()], axis=0)]
    return rows[np.argsort(space.table.many(rows, ("macs",))["macs"], kind="stable")]


def name_of(row: NDArray[np.int64]) -> str:
    """A digit per block: the position of its choice."""
    return "".join(map(str, row))


def train_one(job: Job, materials: Materials, row: NDArray[np.int64]) -> Record:
    """What a trial of this genotype scores at each of its rungs."""
    recipe = proxy_recipe_of(job.settings)
    recipe = dataclasses.replace(recipe, eval_epochs=rung_epochs(recipe.epochs))
    proxy = Proxy(views=materials.proxy_views, val=materials.splits.val, recipe=recipe)
    started = time.process_time()
    student = proxy.prepare(job.space.student(job.space.table.genotype(row)))
    result = train(student, proxy.views, recipe, val=proxy.val)
    return {"scores": [score for _, score in result.accuracies], "seconds": round(time.process_time() - started, 2)}


def table_of(job: Job, materials: Materials, records: Records, rows: NDArray[np.int64]) -> dict[str, object]:
    """The table: what was searched, the library's damages, and scores by genotype."""
    found = {name_of(row): records[name_of(row)] for row in rows}
    costs = job.space.table.many(rows, ("params", "macs"))
    seconds = np.mean([record["seconds"] for record in found.values()])
    return {
        "about": (
            f"python studies/tabulate_trials.py, seed 0, {datetime.date.today()}, {platform.machine()}, one thread, "
            f"torch {torch.__version__}, timm {timm.__version__}; {seconds:.2f} CPU "
            f"seconds per genotype; teacher {materials.teacher.val_accuracy:.4f} on {len(materials.splits.val)} "
            "validation images"
        ),
        "study": STUDY,
        "blocks": {block.name: [str(choice) for choice in block.choices] for block in job.space.blocks},
        "damages": [np.round(damage, 6).tolist() for damage in job.space.damages()],
        "rungs": rung_epochs(job.settings.proxy.epochs),
        "columns": ["choices", "params", "macs", "score at each rung"],
        "rows": [
            [name, int(params), int(macs), *(round(score, 5) for score in found[name]["scores"])]
            for name, params, macs in zip(map(name_of, rows), costs["params"], costs["macs"], strict=True)
        ],
    }


def write(table: dict[str, object], path: Path) -> None:
    """JSON with a line per genotype."""
    head = {key: value for key, value in table.items() if key != "rows"}
    lines = ",\n".join(json.dumps(row) for row in table["rows"])  # type: ignore[attr-defined]
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", default="results/tabulate", help="teacher, library and finished genotypes")
    parser.add_argument("--table", type=Path, default=Path("docs/results/samplers_table.json"))
    parser.add_argument("--count", action="store_true", help="only tell how many genotypes there are")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = [*STUDY.split(), "--data-dir", arguments.data_dir, "--out", arguments.out]
    job = prepare(parse_study(command), InMemoryStorage())
    rows = within(job.space)
    if arguments.count:
        print(len(rows), "of", np.prod([len(block.choices) for block in job.space.blocks]))
        return
    stages = Stages(console_for(sys.stderr))
    job, materials = gather(job, stages)
    records = Records(job.out / "genotypes.jsonl")
    missing = [row for row in rows if name_of(row) not in records]
    with stages.stage("genotypes", max(1, len(missing))) as advance:
        for row in missing:
            records[name_of(row)] = train_one(job, materials, row)
            advance(f"{name_of(row)}: {100 * records[name_of(row)]['scores'][-1]:.1f} %")
    write(table_of(job, materials, records, rows), arguments.table)


if __name__ == "__main__":
    main()
