"""What the tables of both papers' studies share: datasets from the command line, means over seeds, the hardware."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

FOLDERS = ("", "folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset by the name that tables show, and the arguments that say which it is to our commands."""

    name: str
    arguments: tuple[str, ...]


def add_datasets(parser: argparse.ArgumentParser) -> None:
    """`--dataset NAME --data-dir DIR`, as often as there are datasets."""
    parser.add_argument(
        "--dataset", action="append", default=[], help="as for nas_kd.study (digits); repeatable, then every --data-dir"
    )
    parser.add_argument("--data-dir", action="append", default=[], help="where the data lies (repeatable)")


def datasets_of(arguments: argparse.Namespace) -> tuple[Dataset, ...]:
    """The datasets that were named, in order; the handwritten digits where none was."""
    if len(arguments.data_dir) > len(arguments.dataset):
        raise SystemExit("each --data-dir needs its --dataset before it, e.g. --dataset folder --data-dir DIR")
    pairs = itertools.zip_longest(arguments.dataset, arguments.data_dir)
    return tuple(_dataset(dataset, where) for dataset, where in pairs) or (Dataset(name="digits", arguments=()),)


def _dataset(dataset: str, where: str | None) -> Dataset:
    """A folder of images is called by its own name."""
    name = Path(where).resolve().name if dataset in FOLDERS and where else dataset.rpartition("/")[2]
    return Dataset(name=name, arguments=("--dataset", dataset, *(["--data-dir", where] if where else [])))


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The mean, and where there are several their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def hardware() -> str:
    """Processor or GPU, and the versions that matter."""
    where = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"one thread of {os.cpu_count()} shared cores"
    )
    return f"{platform.machine()}, {where}, torch {torch.__version__}, timm {timm.__version__}"
