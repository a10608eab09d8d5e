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
from nas_kd.training.data import LOOK

MODELS = ("mobilenetv2_100", "resnet50")
IMAGES, VALIDATION, SIDE = 1_281_167, 50_000, 224
TRIALS, BASELINES, SHARE = 20, 3, 0.5  # of a study; of the base's MACs do its students have
TRAINING = 3  # forward passes that a training step costs
GPUS = (8, 64)


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
    gpus = "".join(f" {count} GPUs |" for count in GPUS)
    yield f"| base | stage | |{gpus} images decoded | cores that keep up with {GPUS[0]} | with {GPUS[1]} |"
    yield f"|{'---|' * (6 + len(GPUS))}"
    for model in MODELS:
        base = timm.create_model(model)
        macs = Space(base, img_size=SIDE).base_cost().macs
        for stage in stages(arguments):
            alone = stage.passes * macs / arguments.macs_rate
            times = [alone / count for count in GPUS]
            cores = [stage.decoded / arguments.decoded / time for time in times]
            cells = [*map(duration, times), f"{stage.decoded / 1e6:.2f} M", *(f"{number:,.0f}" for number in cores)]
            yield f"| {model} | {stage.name} | {stage.what} | {' | '.join(cells)} |"


def duration(seconds: float) -> str:
    """In the unit that suits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs-rate", type=float, default=34_650 * TRAINING * 40_551_040, help="MACs/s of one GPU")
    parser.add_argument("--decoded", type=float, default=150.0, help="images/s that one core decodes and augments")
    parser.add_argument("--proxy-images", type=int, default=100_000, help="of a trial")
    parser.add_argument("--front", type=int, default=5, help="models of the front")
    parser.add_argument("--epochs", type=int, default=30, help="of refinement")
    print("\n".join(table(parser.parse_args())))


if __name__ == "__main__":
    main()
