"""A result on a microcontroller, without a board: `python -m nas_kd.mcu FOLDER --data-dir DIR`."""

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
from nas_kd.arguments.search import add_accelerator
from nas_kd.budget import ACCELERATOR, short
from nas_kd.data.dataset_names import choose_dataset
from nas_kd.errors import ModelError

if TYPE_CHECKING:
    from nas_kd.pipeline.device import OnDevice


@dataclass(frozen=True, slots=True, kw_only=True)
class McuSettings:
    """What the command is asked for."""

    network: NetworkSettings = part(NetworkSettings)
    data: DataSettings = part(DataSettings)
    images: int = 50
    accelerator: str = ACCELERATOR
    c: str | None = None
    cache: str | None = None
    quiet: bool = False
    debug: bool = False

    @property
    def folder(self) -> Path:
        """The exported model's folder."""
        return self.network.folder


def parse_mcu(argv: Sequence[str]) -> McuSettings:
    """Reads the arguments of the mcu command. Raises NasKdError for bad ones."""
    parser = Parser(
        prog="python -m nas_kd.mcu",
        description="Writes an int8 result for TensorFlow Lite Micro, runs it there and compiles it for an Ethos-U.",
    )
    add = parser.add_argument
    add(
        "model",
        type=model_name,
        metavar="FOLDER",
        help="a folder that a study exported with --int8, or that quantize wrote to",
    )
    add("--images", type=number(1), metavar="N", help="test images to run in the interpreter (%(default)s)")
    add_accelerator(add)
    add("--c", type=path, metavar="DIR", help="also write a folder in C++ that runs it in TensorFlow Lite Micro")
    add(
        "--cache",
        type=path,
        metavar="DIR",
        help="decoded images, shared with a study: results/STUDY/cache (FOLDER/cache)",
    )
    add_quiet(add)
    add_look(parser)
    parser.take_defaults(defaults(McuSettings))
    arguments = vars(parser.parse_args(argv))
    arguments["dataset"] = choose_dataset(arguments["dataset"], arguments["data_dir"])
    return read(McuSettings, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Puts a result on a microcontroller and returns the exit code: 0 done, 2 a mistake of the user's."""
    return guarded(lambda arguments: run_mcu(parse_mcu(arguments)), argv)


def run_mcu(settings: McuSettings) -> int:
    """The whole way from an exported folder to what it takes on a device, the result on standard output."""
    from nas_kd.progress import Stages, configure, console_for

    console = console_for(sys.stderr)
    configure(console, quiet=settings.quiet, debug=settings.debug)
    if not settings.network.is_exported:
        raise ModelError(f"there is no exported model in {settings.network.model}: name a folder that a study wrote")

    import numpy as np
    import torch

    from nas_kd.data.splits import load_splits
    from nas_kd.networks.c_project import write_c
    from nas_kd.networks.tflite_file import need_tools
    from nas_kd.pipeline.device import TFLITE, check_int8, put_on_device
    from nas_kd.pipeline.quantisation import inputs_of
    from nas_kd.preparation.given import prepare_network

    check_int8(settings.folder)
    need_tools()
    stages = Stages(console, quiet=settings.quiet)
    _, spec = prepare_network(settings.network, settings.data)
    with stages.stage("data"):
        splits = load_splits(spec, Path(settings.cache) if settings.cache else settings.folder / "cache")
    with stages.stage("device"):
        shown = np.linspace(0, len(splits.test) - 1, min(settings.images, len(splits.test))).round()  # of all classes
        result = put_on_device(
            settings.folder, splits.test[torch.from_numpy(shown).long()].decoded(), settings.accelerator
        )
        if settings.c:
            write_c(settings.folder / TFLITE, inputs_of(splits.test[:1].decoded())[0].numpy(), Path(settings.c))
    out = console_for(sys.stdout)
    for line in _lines(result, settings.folder, settings.c):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _lines(result: OnDevice, folder: Path, c: str | None) -> Iterator[str]:
    """What a person should know."""
    arena, answers, compiled = result.arena, result.answers, result.compiled
    operators = ", ".join(f"{count} {kind}" for kind, count in result.operators.items())
    yield f"flash {result.bytes:,} bytes: the file, {operators}"
    yield f"ram {arena.total:,} bytes: TensorFlow Lite Micro's arena, activations {arena.head:,}, tail {arena.tail:,}"
    yield (
        f"answers: as ONNX Runtime's int8 on {answers.same:.1%} of {answers.images} test images, "
        f"at most {answers.steps:.0f} steps of rounding apart; "
        f"{answers.accuracy:.1%} right, {answers.onnx_accuracy:.1%} in ONNX Runtime"
    )
    yield (
        f"{compiled.accelerator} ({compiled.system}): {compiled.cycles:,} cycles, {compiled.images_per_second:,.0f} "
        f"images per second, {short(compiled.sram)} bytes of SRAM, {short(compiled.flash)} of flash (Vela's estimate)"
    )
    if compiled.cpu_operators:
        yield f"{compiled.cpu_operators} operators run on the processor beside it: that costs time Vela does not count"
    yield f"files: {folder}{f', in C++ {c}' if c else ''}"


if __name__ == "__main__":
    sys.exit(main())
