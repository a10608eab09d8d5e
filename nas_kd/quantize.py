"""A result, or any timm CNN, as int8: `python -m nas_kd.quantize FOLDER --data-dir DIR`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from nas_kd.arguments.parsing import Parser, guarded, number
from nas_kd.arguments.shared import add_data
from nas_kd.budget import short
from nas_kd.errors import ModelError, NasKdError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from nas_kd.pipeline.quantisation import Quantised
    from nas_kd.training.data import DataSpec

_LOCAL = "local-dir:"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """What the command is asked for."""

    model: str
    pretrained: bool
    initial_checkpoint: str | None
    img_size: int | None
    dataset: str | None
    data_dir: str | None
    train_images: int | None
    val_fraction: float
    calibration_images: int
    keep_float: tuple[str, ...]
    recover: bool
    threads: int
    workers: int
    seed: int
    out: str | None
    cache: str | None
    quiet: bool
    debug: bool

    @property
    def folder(self) -> Path:
        """Where the files go: as asked for, the folder of an exported model, or one of its own."""
        if self.out is not None:
            return Path(self.out)
        if self.model.startswith(_LOCAL):
            return Path(self.model.removeprefix(_LOCAL))
        return Path("results") / f"quantize-{Path(self.model).name}"


def parse_quantize(argv: Sequence[str]) -> QuantizeSettings:
    """Reads the arguments of the quantize command. Raises NasKdError for bad ones."""
    parser = Parser(
        prog="python -m nas_kd.quantize",
        description="Writes a model as int8 ONNX, calibrated on training images, and measures it beside its float form.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder that a study exported, local-dir:FOLDER, or a timm model")
    add("--pretrained", action="store_true", help="take timm's weights")
    add("--initial-checkpoint", metavar="FILE", help="take these weights (.safetensors, .pth)")
    add("--img-size", type=number(4), metavar="N", help="side of the images in pixels (the model's)")
    add(
        "--calibration-images", type=number(1), default=300, metavar="N", help="training images that calibrate it (300)"
    )
    add(
        "--keep-float", action="append", default=[], metavar="P", help="layers that stay float: 'layer4.*' (repeatable)"
    )
    add("--no-recover", action="store_false", dest="recover", help="never train a loss away")
    add("--threads", type=number(1), default=1, metavar="N", help="CPU threads that run it while it is timed (1)")
    add("--workers", type=number(1), default=2, metavar="N", help="threads that decode images (2)")
    add(
        "--seed",
        type=number(0, int, 2**32),
        default=0,
        metavar="N",
        help="the seed of the study, which cut the data (0)",
    )
    add("--out", metavar="DIR", help="where the files go (the model's folder, or results/quantize-MODEL)")
    add("--cache", metavar="DIR", help="decoded images, shared with a study: results/STUDY/cache (OUT/cache)")
    add("-q", "--quiet", action="store_true", help="print the result alone")
    add("--debug", action="store_true", help="tracebacks and debug messages")
    add_data(parser)
    arguments = vars(parser.parse_args(argv))
    if Path(arguments["model"], "config.json").is_file():
        arguments["model"] = f"{_LOCAL}{arguments['model']}"
    has_weights = arguments["pretrained"] or arguments["initial_checkpoint"] or arguments["model"].startswith(_LOCAL)
    if not has_weights:
        raise NasKdError(
            f"{arguments['model']} has no weights: name an exported folder, --pretrained or --initial-checkpoint"
        )
    arguments["keep_float"] = tuple(arguments["keep_float"])
    return QuantizeSettings(**{field.name: arguments[field.name] for field in fields(QuantizeSettings)})


def main(argv: Sequence[str] | None = None) -> int:
    """Quantises a model and returns the exit code: 0 done, 2 a mistake of the user's, 130 interrupted."""
    return guarded(lambda arguments: run_quantize(parse_quantize(arguments)), argv)


def run_quantize(settings: QuantizeSettings) -> int:
    """The whole way from settings to the int8 file, progress on standard error, the result on standard output."""
    from nas_kd.progress import Stages, configure, console_for

    console = console_for(sys.stderr)
    configure(console, quiet=settings.quiet, debug=settings.debug)

    from nas_kd.models.onnx import need
    from nas_kd.pipeline.job import open_folder
    from nas_kd.pipeline.quantisation import Int8Spec, quantise_network
    from nas_kd.training.augment import default_augmentation
    from nas_kd.training.data import load_splits

    need("onnx", "onnxruntime")
    stages = Stages(console, quiet=settings.quiet)
    network, spec = _network(settings)
    folder = open_folder(settings.folder)
    with stages.stage("data"):
        splits = load_splits(spec, Path(settings.cache) if settings.cache else folder / "cache")
    _check_classes(network, splits.num_classes)
    with stages.stage("int8"):
        result = quantise_network(
            network,
            splits,
            folder,
            Int8Spec(
                calibration_images=settings.calibration_images,
                keep_float=settings.keep_float,
                recover=settings.recover,
                threads=settings.threads,
                seed=settings.seed,
            ),
            default_augmentation(spec.dataset),
        )
    out = console_for(sys.stdout)
    out.print(_table(result), crop=False)
    for line in (*_lines(result), f"files: {folder}"):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0
