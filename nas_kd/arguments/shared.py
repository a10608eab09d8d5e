"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

from nas_kd.arguments.parsing import model_name, number, path, size, storage
from nas_kd.budget import ACCELERATOR, ACCELERATORS
from nas_kd.data.preprocessing import INTERPOLATIONS
from nas_kd.errors import NasKdError

RATE = number(1e-9, float, math.inf)  # a learning rate
SPACE, STAGES = "width,kernel,conv=fast,keep", True  # what may change by default


def add_base(parser: argparse.ArgumentParser) -> None:
    """The arguments that name base and teacher."""
    group = parser.add_argument_group("base and teacher (as in timm)")
    add = group.add_argument
    add(
        "--model",
        type=model_name,
        default="resnet18",
        metavar="NAME",
        help="timm model to search from, or the folder of an exported one (resnet18)",
    )
    add("--pretrained", action="store_true", help="take timm's weights as the teacher's")
    add(
        "--initial-checkpoint",
        type=path,
        metavar="FILE",
        help="take these weights as the teacher's (.safetensors, .pth)",
    )
    add_shape(add)
    add = parser.add_argument_group("another teacher than the base (for the same images)").add_argument
    add(
        "--teacher",
        type=model_name,
        metavar="NAME",
        help="what teaches the students: a timm model, or the folder of an exported one (the base)",
    )
    add("--teacher-pretrained", action="store_true", help="take timm's weights for it")
    add(
        "--teacher-checkpoint",
        type=path,
        metavar="FILE",
        help="take these weights for it; without any, it is trained here",
    )


def check_teacher(arguments: Mapping[str, Any]) -> None:
    """Raises NasKdError for weights of a teacher that is not named, or for two sets of weights."""
    given = [name for name in ("teacher_pretrained", "teacher_checkpoint") if arguments[name]]
    if given and arguments["teacher"] is None:
        raise NasKdError(f"--{given[0].replace('_', '-')} speaks of a teacher: name one by --teacher")
    if len(given) > 1:
        raise NasKdError("--teacher-pretrained does not go with --teacher-checkpoint: leave one of them out")


def add_shape(add: Callable[..., object]) -> None:
    """The arguments that say what a network reads and writes."""
    add("--reduction", type=number(1), metavar="R", help="total stride of the network; small images need 8 or 4")
    add("--img-size", type=number(4), metavar="N", help="side of the images in pixels (the model's; digits: 16)")
    add("--in-chans", type=int, choices=(1, 3), help="channels of the images (3; digits: 1)")
    add("--num-classes", type=number(2), metavar="N", help="outputs (as many as the data has classes)")


def add_data(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a dataset."""
    group = parser.add_argument_group("data")
    add = group.add_argument
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
        default=0.2,
        metavar="F",
        help="cut from train to select on, where the data has not both val and test (0.2)",
    )


def add_look(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that looks at a finished model on its data."""
    add = parser.add_argument
    add("--workers", type=number(1), default=2, metavar="N", help="threads or processes that decode images (2)")
    add(
        "--seed",
        type=number(0, int, 2**32),
        default=0,
        metavar="N",
        help="the seed of the study, which cut the data (0)",
    )
    add("-q", "--quiet", action="store_true", help="print the result alone")
    add("--debug", action="store_true", help="tracebacks and debug messages")
    add_data(parser)


def add_choices(add: Callable[..., object]) -> None:
    """The arguments that say what a base may become."""
    add(
        "--space",
        default=SPACE,
        metavar="S",
        help="what may change: width,kernel,conv,keep, with values as in conv=standard/depthwise; conv=fast: the kinds"
        f" that save time; keep: blocks may go ({SPACE})",
    )
    add(
        "--search-stages",
        action=argparse.BooleanOptionalAction,
        default=STAGES,
        help="each stage's residual stream gets a width as well (yes)",
    )
    add("--pin", action="append", default=[], metavar="P", help="limit blocks: 'layer1.*:conv=standard' (repeatable)")
    add(
        "--channel-multiple",
        type=number(1),
        default=8,
        metavar="N",
        help="what stays of many channels is a multiple of it, as runtimes and accelerators like it (8)",
    )


def add_accelerator(add: Callable[..., object]) -> None:
    """Whose cycles are meant."""
    add("--accelerator", choices=ACCELERATORS, default=ACCELERATOR, help=f"whose cycles count ({ACCELERATOR})")


def add_library(add: Callable[..., object]) -> None:
    """How much the library of trained block choices may cost."""
    add(
        "--library-budget",
        type=number(0, float, 0.9),
        default=0.12,
        metavar="F",
        help="share of the study's work that goes into the library of trained block choices; 0: none (0.12)",
    )


def add_recipe(add: Callable[..., object]) -> None:
    """The arguments that say how networks are trained."""
    add(
        "--teacher-epochs",
        type=number(1),
        metavar="N",
        help="epochs of the teacher (by the data's size; few from given weights)",
    )
    add("--batch-size", type=number(2), default=64, metavar="N", help="images per step (64)")
    add(
        "--lr",
        type=RATE,
        default=0.005,
        metavar="F",
        help="peak learning rate of students (0.005)",
    )
    add("--views", type=number(1), default=8, metavar="N", help="augmented views with cached teacher logits (8)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, … (cuda where there is one)")
    add("--amp", action="store_true", help="mixed precision")
    add("--workers", type=number(1), default=2, metavar="N", help="threads or processes that decode images (2)")
    add("--seed", type=number(0, int, 2**32), default=0, metavar="N", help="decides everything that is random (0)")


def add_proxy_rate(add: Callable[..., object]) -> None:
    """How fast the short trainings are that a search ranks students by."""
    add("--proxy-lr", type=RATE, metavar="F", help="peak learning rate of a trial (0.4 of --lr)")


def add_report(add: Callable[..., object]) -> None:
    """The arguments that say where results go and what is printed."""
    add("--out", type=path, metavar="DIR", help="output folder (results/STUDY); the same command again resumes")
    add("--study-name", metavar="NAME", help="name of the study (made of model, dataset and budget)")
    add("-q", "--quiet", action="store_true", help="print the result alone")
    add("--debug", action="store_true", help="tracebacks and debug messages")


def add_baselines(add: Callable[..., object]) -> None:
    """Whether anything is trained to compare with."""
    add(
        "--no-baselines",
        dest="baselines",
        action="store_false",
        help="train no models to compare with: the same without a teacher, one width everywhere, a random one",
    )


def add_onnx(add: Callable[..., object]) -> None:
    """Whether models are written as ONNX too."""
    add(
        "--onnx",
        action=argparse.BooleanOptionalAction,
        help="write the front's models as ONNX as well (where onnx is installed)",
    )


def add_storage(add: Callable[..., object]) -> None:
    """Where a study lives."""
    add(
        "--storage",
        type=storage,
        metavar="URL",
        help="Optuna storage: a URL, or a file for SQLite (study.db in the output folder, or $NAS_KD_STORAGE)",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The arguments of processes that train trials."""
    add = parser.add_argument_group("workers (docs/workers.md)").add_argument
    add("--jobs", type=number(1), default=1, metavar="N", help="processes that train trials, spread over the GPUs (1)")
    add(
        "--artifacts",
        type=path,
        metavar="STORE",
        help="where workers on other machines fetch the teacher, views and library: FOLDER, s3://… or gs://…",
    )
    add(
        "--grace-period",
        type=number(4),
        default=120,
        metavar="S",
        help="seconds of silence after which a worker is dead and its trial goes to another (120)",
    )
