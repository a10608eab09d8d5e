"""A result, or any timm CNN, as int8: `python -m nas_kd.quantize FOLDER --data-dir DIR`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nas_kd.arguments.data import DataSettings, add_look
from nas_kd.arguments.network import NetworkSettings
from nas_kd.arguments.output import add_quiet
from nas_kd.arguments.parsing import Parser, guarded, model_name, number, path
from nas_kd.arguments.parts import defaults, part, read
from nas_kd.budget import short
from nas_kd.data.dataset_names import choose_dataset

if TYPE_CHECKING:
    from rich.table import Table

    from nas_kd.pipeline.quantisation import Quantised


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """What the command is asked for."""

    network: NetworkSettings = part(NetworkSettings)
    data: DataSettings = part(DataSettings)
    calibration_images: int = 300
    keep_float: tuple[str, ...] = ()
    recover: bool = True
    threads: int = 1
    out: str | None = None
    cache: str | None = None
    quiet: bool = False
    debug: bool = False

    @property
    def folder(self) -> Path:
        """Where the files go: as asked for, the folder of an exported model, or one of its own."""
        if self.out is not None:
            return Path(self.out)
        if self.network.is_exported:
            return self.network.folder
        return Path("results") / f"quantize-{Path(self.network.model).name}"


def parse_quantize(argv: Sequence[str]) -> QuantizeSettings:
    """Reads the arguments of the quantize command. Raises NasKdError for bad ones."""
    parser = Parser(
        prog="python -m nas_kd.quantize",
        description="Writes a model as int8 ONNX, calibrated on training images, and measures it beside float.",
    )
    add = parser.add_argument
    add("model", type=model_name, metavar="MODEL", help="a folder that a study exported, or a timm model")
    add("--pretrained", action="store_true", help="take timm's weights")
    add("--initial-checkpoint", type=path, metavar="FILE", help="take these weights (.safetensors, .pth)")
    add("--img-size", type=number(4), metavar="N", help="side of the images in pixels (the model's)")
    add("--calibration-images", type=number(1), metavar="N", help="training images that calibrate it (%(default)s)")
    add(
        "--keep-float", action="append", default=[], metavar="P", help="layers that stay float: 'layer4.*' (repeatable)"
    )
    add("--no-recover", action="store_false", dest="recover", help="never train a loss away")
    add("--threads", type=number(1), metavar="N", help="CPU threads that run it while it is timed (%(default)s)")
    add("--out", type=path, metavar="DIR", help="where the files go (the model's folder, or results/quantize-MODEL)")
    add(
        "--cache", type=path, metavar="DIR", help="decoded images, shared with a study: results/STUDY/cache (OUT/cache)"
    )
    add_quiet(add)
    add_look(parser)
    parser.take_defaults(defaults(QuantizeSettings))
    arguments = vars(parser.parse_args(argv))
    arguments["keep_float"] = tuple(arguments["keep_float"])
    arguments["dataset"] = choose_dataset(arguments["dataset"], arguments["data_dir"])
    return read(QuantizeSettings, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Quantises a model and returns the exit code: 0 done, 2 a mistake of the user's, 130 interrupted."""
    return guarded(lambda arguments: run_quantize(parse_quantize(arguments)), argv)


def run_quantize(settings: QuantizeSettings) -> int:
    """The whole way from settings to the int8 file, progress on standard error, the result on standard output."""
    from nas_kd.progress import Stages, configure, console_for

    console = console_for(sys.stderr)
    configure(console, quiet=settings.quiet, debug=settings.debug)

    from nas_kd.data.splits import load_splits
    from nas_kd.networks.onnx import need
    from nas_kd.pipeline.quantisation import Int8Spec, quantise_network
    from nas_kd.preparation.augmenting import fresh_images
    from nas_kd.preparation.given import prepare_network
    from nas_kd.preparation.job import open_folder

    need("onnx", "onnxruntime")
    stages = Stages(console, quiet=settings.quiet)
    network, spec = prepare_network(settings.network, settings.data)
    folder = open_folder(settings.folder)
    with stages.stage("data"):
        splits = load_splits(spec, Path(settings.cache) if settings.cache else folder / "cache")
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
                seed=settings.data.seed,
            ),
            fresh_images(settings.data, splits.train, splits.num_classes),
        )
    out = console_for(sys.stdout)
    out.print(_table(result), crop=False)
    for line in (*_lines(result), f"files: {folder}"):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _table(result: Quantised) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("file", "test %", "bytes", "ms"):
        table.add_column(heading, justify="left" if heading == "file" else "right", no_wrap=True)
    for form in (result.exact, result.int8):
        table.add_row(form.file, f"{100 * form.test_accuracy:.1f}", short(form.bytes), f"{form.milliseconds:.3f}")
    return table


def _lines(result: Quantised) -> Iterator[str]:
    """What a person should know besides the table."""
    faster = result.exact.milliseconds / result.int8.milliseconds
    words = f"{faster:.1f} times as fast" if faster >= 1 else f"{1 / faster:.1f} times slower"
    yield f"deploy {result.deploy.file}: int8 is {words} in ONNX Runtime on this machine"
    if result.recovered:
        yield (
            f"calibration alone lost {100 * result.calibration_loss:.1f} points of validation accuracy; a short "
            "training under rounding brought it back: its float weights are in model.int8.safetensors"
        )
    worst = ", ".join(f"{layer.module} ({layer.added:.2g})" for layer in result.worst[:3])
    yield f"layers that int8 hurts most (what each adds to its output's relative squared error): {worst}"


if __name__ == "__main__":
    sys.exit(main())
