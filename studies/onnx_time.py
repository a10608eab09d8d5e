"""What an ONNX file costs by torch's older exporter, as `write_model` uses it, and by its newer one.

    python studies/onnx_time.py [MODEL ...] [--img-size 64]

CPU-seconds of writing each network for any number of images: `write_model` with what it does after the older exporter
(folding constants, comparing outputs), the newer exporter alone. After them the operators of both files, and how far
their outputs are from the network's as a fraction of the largest. One network is written by both before, uncounted: the
first export of a process loads what the later ones find loaded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx
import timm
import torch
from paper_tables import hardware
from torch import nn

from nas_kd.networks.onnx import _export, difference, write_model

MODELS = ("resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "regnetx_002", "densenet121")
COLUMNS = ("model", "older s", "newer s", "newer / older", "operators", "newer's", "outputs apart", "newer's")
Writer = Callable[[nn.Module, Sequence[int], Path], None]


def write_newer(network: nn.Module, size: Sequence[int], path: Path) -> None:
    """As `write_model` does where the older exporter's file will not do."""
    shapes = ({0: torch.export.Dim("batch")},)
    _export(
        network, (torch.zeros(2, *size),), path, dynamic_shapes=shapes, input_names=["input"], output_names=["output"]
    )


def measured(write: Writer, network: nn.Module, size: Sequence[int]) -> tuple[float, int, float]:
    """CPU-seconds, operators in the file, and how far its outputs are from the network's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        started = time.process_time()
        write(network, size, path)
        seconds = time.process_time() - started
        apart = difference(network, size, path)
        assert apart is not None, "pip install onnxruntime"
        return seconds, len(onnx.load(path).graph.node), apart


def table(models: Sequence[str], side: int) -> Iterator[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    size = (3, side, side)
    for write in (write_model, write_newer):
        measured(write, timm.create_model("resnet10t").eval(), size)
    for name in models:
        network = timm.create_model(name, num_classes=10).eval()
        older, newer = (measured(write, network, size) for write in (write_model, write_newer))
        cells = [f"{older[0]:.1f}", f"{newer[0]:.1f}", f"{newer[0] / older[0]:.1f}", older[1], newer[1]]
        yield f"| {name} | {' | '.join(map(str, cells))} | {older[2]:.0e} | {newer[2]:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="timm models")
    parser.add_argument("--img-size", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{hardware()}; {arguments.img_size}×{arguments.img_size} pixels\n")
    for line in table(arguments.models, arguments.img_size):
        print(line, flush=True)


if __name__ == "__main__":
    main()
