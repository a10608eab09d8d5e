"""Which images a command is about, and how they are seen: the arguments, and the value that holds them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

from nas_kd.arguments.augment import AugmentOptions
from nas_kd.arguments.parsing import number, path, size
from nas_kd.data.preprocessing import INTERPOLATIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Images: which, how many of them, how they are read, resized and augmented. The `seed` cuts and augments them; all
    else that is random follows from it, too."""

    dataset: str
    data_dir: str | None = None
    num_classes: int | None = None
    class_map: str | None = None
    skip_unreadable: bool = False
    data_memory: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    train_images: int | None = None
    val_fraction: float = 0.2
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    workers: int = 2
    seed: int = 0


def add_data(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a dataset."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        metavar="NAME",
        help="digits (ships with scikit-learn), folder, wds (WebDataset shards), or a name of timm's dataset factory"
        " (torch/cifar10, torch/fashion_mnist, …); folder with --data-dir, else digits",
    )
    add(
        "--data-dir",
        type=path,
        metavar="DIR",
        help="where the data lies; alone: image folders, one per class, split or not",
    )
    add(
        "--class-map",
        type=path,
        metavar="FILE",
        help="the number of each class: a text file with one class per line, or JSON (timm's order of the folders)",
    )
    add("--skip-unreadable", action="store_true", help="go on without images that cannot be read")
    add(
        "--data-memory",
        type=size,
        metavar="SIZE",
        help="images that take more when they are decoded, like 4G, are not kept but decoded in every epoch, by as many"
        " processes as --workers says; 0: always (half of the machine's memory)",
    )
    add(
        "--crop-pct",
        type=number(0.01, float, 1 + 1e-9),
        metavar="F",
        help="images are resized to the network's size / F and cropped at the centre (the model's; 1 for tiny images)",
    )
    add(
        "--interpolation",
        choices=INTERPOLATIONS,
        help="how images are resized (the model's; bilinear for tiny images)",
    )
    add("--train-images", type=number(2), metavar="N", help="use at most so many training images, class by class (all)")
    add(
        "--val-fraction",
        type=number(0.01, float, 1),
        metavar="F",
        help="cut from train to select on, where the data has not both val and test (%(default)s)",
    )


def add_reading(add: Callable[..., object], seed: str = "decides everything that is random") -> None:
    """How many read the images, and what decides how these are cut."""
    add("--workers", type=number(1), metavar="N", help="threads or processes that decode images (%(default)s)")
    add("--seed", type=number(0, int, 2**32), metavar="N", help=f"{seed} (%(default)s)")


def add_look(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that looks at a finished model on its data."""
    add_reading(parser.add_argument, "the seed of the study, which cut the data")
    add_data(parser)
