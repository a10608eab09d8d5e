"""What a study of ImageNet costs on 8 and on 64 GPUs, on paper: counts of the code, rates that were measured.

    python studies/scale.py > table.md      # the table of docs/scale.md

How many images each stage shows to which network follows from the command that docs/scale.md gives, with the images
streaming (the teacher is asked in every step). What an image costs follows from the MACs: a training step counts three
times its forward pass. How many MACs a second a GPU does, and how many images a second a core decodes, was measured
(`--macs-rate`: studies/gpu.py, ResNet-20 on one H200; `--decoded`: studies/streaming.py, one core). Processes are
taken to share the work without a loss, which was not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import timm

from nas_kd import Space
from nas_kd.data.splits import LOOK

MODELS = ("mobilenetv2_100", "resnet50")
IMAGES, VALIDATION, SIDE = 1_281_167, 50_000, 224
TRIALS, BASELINES, SHARE = 20, 3, 0.5  # of a study; of the base's MACs do its students have
TRAINING = 3  # forward passes that a training step costs
GPUS = (8, 64)
SHORT = 60.0  # seconds: who has to wait for a core then does not wait long


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a stage shows to networks, in passes of the base over one image, and how many images are decoded for it."""

    name: str
    what: str
    passes: float
    decoded: int


def stages(arguments: argparse.Namespace) -> Iterator[Stage]:
    """The stages of a study whose teacher knows ImageNet."""
    yield Stage(name="teacher", what="validated, not trained", passes=VALIDATION, decoded=VALIDATION)
    seen = arguments.proxy_images
    yield Stage(
        name="search",
        what=f"{TRIALS} trials on {seen:,} images",
        passes=TRIALS * SHARE * (seen * TRAINING + LOOK) + seen,
        decoded=seen + LOOK,  # their views are kept
    )
    each = arguments.epochs * (IMAGES * (TRAINING * SHARE + 1) + VALIDATION * SHARE)  # a student beside its teacher
    models, decoded = arguments.front + BASELINES, arguments.epochs * (IMAGES + VALIDATION)
    yield Stage(
        name="refinement",
        what=f"{models} models, {arguments.epochs} epochs",
        passes=models * each,
        decoded=models * decoded,
    )


def table(arguments: argparse.Namespace) -> Iterator[str]:
    headings = ["base", "stage", "", *(f"{count} GPUs" for count in GPUS), "images decoded"]
    headings += [f"cores that keep up with {count}" for count in GPUS]
    yield f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}"
    for model in MODELS:
        macs = Space(timm.create_model(model), img_size=SIDE).base_cost().macs
        for stage in stages(arguments):
            times = [stage.passes * macs / arguments.macs_rate / count for count in GPUS]
            cores = [f"{stage.decoded / arguments.decoded / time:,.0f}" if time > SHORT else "" for time in times]
            cells = [model, stage.name, stage.what, *map(duration, times), f"{stage.decoded / 1e6:.2f} M", *cores]
            yield f"| {' | '.join(cells)} |"


def duration(seconds: float) -> str:
    """In the unit that suits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs-rate", type=float, default=34_650 * TRAINING * 40_551_040, help="MACs/s of one GPU")
    parser.add_argument("--decoded", type=float, default=190.0, help="images/s that one core decodes and augments")
    parser.add_argument("--proxy-images", type=int, default=100_000, help="of a trial")
    parser.add_argument("--front", type=int, default=5, help="models of the front")
    parser.add_argument("--epochs", type=int, default=30, help="of refinement")
    print("\n".join(table(parser.parse_args())))


if __name__ == "__main__":
    main()
