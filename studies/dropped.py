"""By what the damage of a dropped block is to be multiplied when damages are added up.

    python studies/dropped.py --weights FILE --data-dir photos [--factors 1 2 4] [what studies/photos.py takes]

A block that is dropped alone is bridged by its shortcut; several in a row are not. The knapsack's solutions with every
choice open, at each of `--shares` of the MACs, with the damages of dropped blocks multiplied by each factor: what they
drop, and what they score as assembled, their batch norms recalibrated, on validation images. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from photos import Study, parser

from nas_kd.budget import Budget
from nas_kd.costs.verification import measure
from nas_kd.search.solver import solve
from nas_kd.training.evaluation import CALIBRATION, evaluate, recalibrate

SPACE = "width,kernel,conv,keep,stages"


def main() -> int:
    arguments = parser()
    arguments.add_argument("--factors", nargs="+", type=float, default=(1.0, 2.0, 4.0))
    report(arguments.parse_args())
    return 0


def report(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    study = Study(arguments)
    space, library, _ = study.library(SPACE)
    base, calibration = measure(study.teacher, study.size).macs, study.views().sample(CALIBRATION)
    print("| MACs | factor | dropped | as assembled: validation | KL there |\n|---|---|---|---|---|")
    for share in arguments.shares:
        for factor in arguments.factors:
            weights = [np.array([1.0 if choice.keep else factor for choice in block.choices]) for block in space.blocks]
            damages = [own * weight for own, weight in zip(library.damages(), weights, strict=True)]
            genotype = solve(space.table, Budget((("macs", share / 100 * base),)), damages, seconds=60)
            assert genotype is not None
            student = library.student(genotype)
            recalibrate(student, calibration)
            dropped = [name for name, choice in genotype.items() if not choice.keep]
            accuracy = f"{100 * evaluate(student, study.ground.splits.val):.1f}"
            cells = (f"{share} %", f"{factor:g}", ", ".join(dropped) or "none", accuracy)
            print(f"| {' | '.join(cells)} | {study._divergence(student):.3f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
