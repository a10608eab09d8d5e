"""What the command line understands. Standard library only, so that `--help` and bad arguments answer at once."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nas_kd import __version__
from nas_kd.budget import parse_budget, parse_levels
from nas_kd.errors import NasKdError, nearest, without_password

STORAGE = "NAS_KD_STORAGE"  # environment variable: a URL with a password is not for every eye on the machine
DISTILLATIONS = ("kd", "dkd", "online")
RUNTIMES = ("torch", "onnx")  # that time a network
SAMPLERS = ("knapsack", "tpe", "nsgaii", "nsgaiii", "random")
PRUNERS = {False: ("front", "none"), True: ("sha", "hyperband", "median", "none")}  # with one objective: Optuna's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of `python -m nas_kd.study`, checked as far as that is possible without torch."""

    model: str
    pretrained: bool
    initial_checkpoint: str | None
    reduction: int | None
    img_size: int | None
    in_chans: int | None
    num_classes: int | None
    dataset: str
    data_dir: str | None
    train_images: int | None
    val_fraction: float
    budget: str
    levels: str
    latency_runtime: str
    latency_device: str
    latency_batch: int
    latency_threads: int
    latency_command: str
    trials: int
    space: str
    search_stages: bool
    pin: tuple[str, ...]
    sampler: str
    library_budget: float
    proxy_epochs: int
    proxy_images: int
    teacher_epochs: int | None
    refine_epochs: int | None
    distill: str
    peers: int
    front: int
    batch_size: int
    lr: float
    views: int
    device: str | None
    amp: bool
    workers: int
    seed: int
    out: str | None
    study_name: str | None
    storage: str | None
    quiet: bool
    debug: bool
    onnx: bool | None = None
    jobs: int = 1
    artifacts: str | None = None
    grace_period: int = 120
    new_study: bool = False
    start_from: tuple[str, ...] = ()
    command: str = ""
    maximize: str | None = None
    pruner: str = "front"

    @property
    def name(self) -> str:
        """The study's name: as given, or model, dataset and budget."""
        text = self.study_name or f"{self.model}-{self.dataset or 'folder'}-{self.budget.replace('=', '')}"
        return re.sub(r"[^\w.%+-]+", "-", text).strip("-.")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are NasKdErrors, so that a wrong argument is one line and exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise NasKdError(f"{message}; see {self.prog} --help")


def number(least: float, kind: type[int] | type[float] = int, below: float | None = None) -> Callable[[str], float]:
    """The type of an argument that is a number, from `least` and below `below`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not value >= least or (below is not None and not value < below):
            top = f" and below {below:g}" if below is not None else ""
            raise argparse.ArgumentTypeError(f"must be at least {least:g}{top}, got {text}")
        return value

    return read


def study_parser(prog: str = "python -m nas_kd.study") -> argparse.ArgumentParser:
    """The parser of the main command."""
    parser = Parser(
        prog=prog,
        description="Any timm CNN in, a family of smaller timm CNNs out, each within a hard budget.",
        epilog=f"example: {prog} --budget params=1M     (no data, network or GPU needed)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nas_kd {__version__}")
    add_base(parser)
    add_data(parser)
    _add_search(parser)
    _add_training(parser)
    _add_output(parser)
    return parser


def add_base(parser: argparse.ArgumentParser) -> None:
    """The arguments that name base and teacher."""
    group = parser.add_argument_group("base and teacher (as in timm)")
    add = group.add_argument
    add("--model", default="resnet18", metavar="NAME", help="timm model to search from, or local-dir:FOLDER (resnet18)")
    add("--pretrained", action="store_true", help="take timm's weights as the teacher's")
    add("--initial-checkpoint", metavar="FILE", help="take these weights as the teacher's (.safetensors, .pth)")
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
        default="digits",
        metavar="NAME",
        help="digits (ships with scikit-learn), a name of timm's dataset"
        " factory (torch/cifar10, torch/fashion_mnist, …), or folder",
    )
    add("--data-dir", metavar="DIR", help="where the data lies; image folders as timm takes them")
    add("--train-images", type=number(2), metavar="N", help="use at most so many training images, class by class (all)")
    add(
        "--val-fraction",
        type=number(0.01, float, 1),
        default=0.2,
        metavar="F",
        help="cut from train to select on (0.2)",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    add = group.add_argument
    add(
        "--budget",
        required=True,
        metavar="B",
        help="hard upper bounds: params=1M,macs=30M,latency=4ms or macs=50%% of the base",
    )
    add("--levels", default="1", metavar="L", help="shares of the budget that get a best model each: 0.25,0.5,1 (1)")
    _add_latency(add)
    add("--trials", type=number(1), default=20, metavar="N", help="students to train; over-budget ones are free (20)")
    _add_choices(add)
    add(
        "--sampler",
        type=_sampler,
        metavar="NAME",
        default="knapsack",
        help=f"who proposes genotypes after the warm starts: {', '.join(SAMPLERS)}, or package.module:Class of your own"
        " (knapsack, never over budget)",
    )
    add("--maximize", choices=("accuracy",), help="search for this alone, within the budget (for a front: costs too)")
    add(
        "--pruner",
        choices=list(dict.fromkeys((*PRUNERS[False], *PRUNERS[True]))),
        help="what stops trials early: front, where cheaper students are better (default); with --maximize Optuna's"
        " sha (successive halving, default), hyperband or median; or none",
    )
    _add_library(add)
    add(
        "--start-from",
        action="append",
        default=[],
        metavar="FILE",
        help="begin with the genotype in this file too: structure.json of nas_kd.structure (repeatable)",
    )
    add("--front", type=number(1), default=8, metavar="N", help="refine at most so many students of the front (8)")


def _sampler(text: str) -> str:
    """The type of --sampler: a short name, or the path of the user's own, which is imported later."""
    if text not in SAMPLERS and not re.fullmatch(r"[^\W\d][\w.]*[.:][^\W\d]\w*", text):
        hint = nearest(text, SAMPLERS)
        raise argparse.ArgumentTypeError(
            f"unknown sampler {text!r}: use {', '.join(SAMPLERS)}, or package.module:Class of your own{hint}"
        )
    return text


def _add_latency(add: Callable[..., object]) -> None:
    add("--latency-runtime", choices=RUNTIMES, default="torch", help="what runs a network while it is timed (torch)")
    add("--latency-device", default="cpu", metavar="D", help="where it is timed: cpu, cuda, cuda:1, … (cpu)")
    add("--latency-batch", type=number(1), default=1, metavar="N", help="images that go through it at once (1)")
    add("--latency-threads", type=number(1), default=1, metavar="N", help="CPU threads that it may use (1)")
    add(
        "--latency-command",
        default="",
        metavar="CMD",
        help="a command of yours that is given an ONNX file and prints the milliseconds of one forward pass",
    )


def _add_library(add: Callable[..., object]) -> None:
    add(
        "--library-budget",
        type=number(0, float, 0.9),
        default=0.25,
        metavar="F",
        help="share of the study's work that goes into the library of trained block choices; 0: none (0.25)",
    )


def _add_choices(add: Callable[..., object]) -> None:
    add(
        "--space",
        default="width,kernel,conv",
        metavar="S",
        help="what may change, e.g. width,conv=standard/depthwise; keep: blocks may go",
    )
    add("--search-stages", action="store_true", help="each stage's residual stream gets a width as well")
    add("--pin", action="append", default=[], metavar="P", help="limit blocks: 'layer1.*:conv=standard' (repeatable)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--proxy-epochs", type=number(1), default=4, metavar="N", help="epochs of a trial, at most (4)")
    add("--proxy-images", type=number(2), default=10_000, metavar="N", help="training images of a trial (10000)")
    add("--refine-epochs", type=number(1), metavar="N", help="epochs of the front's models (by the data's size)")
    add(
        "--distill",
        choices=DISTILLATIONS,
        default="kd",
        help="how the front's models learn: by logit KD or decoupled KD from the teacher, or online, each with its"
        " peers from scratch (kd)",
    )
    add("--peers", type=number(2), default=4, metavar="N", help="students that learn together, with online (4)")
    add_recipe(add)


def add_recipe(add: Callable[..., object]) -> None:
    """The arguments that say how networks are trained."""
    add("--teacher-epochs", type=number(1), metavar="N", help="epochs of a teacher trained here (by the data's size)")
    add("--batch-size", type=number(2), default=64, metavar="N", help="images per step (64)")
    add(
        "--lr",
        type=number(1e-9, float, math.inf),
        default=0.005,
        metavar="F",
        help="peak learning rate of students (0.005)",
    )
    add("--views", type=number(1), default=8, metavar="N", help="augmented views with cached teacher logits (8)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, … (cuda where there is one)")
    add("--amp", action="store_true", help="mixed precision")
    add("--workers", type=number(1), default=2, metavar="N", help="threads that decode images (2)")
    add("--seed", type=number(0, int, 2**32), default=0, metavar="N", help="decides everything that is random (0)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add_report(add)
    add_onnx(add)
    add("--new-study", action="store_true", help="begin anew under this name; the study that had it is kept")
    add("--storage", metavar="URL", help="Optuna storage (study.db in the output folder, or $NAS_KD_STORAGE)")
    _add_workers(parser)


def add_onnx(add: Callable[..., object]) -> None:
    """Whether models are written as ONNX too."""
    add(
        "--onnx",
        action=argparse.BooleanOptionalAction,
        help="write the front's models as ONNX as well (where onnx is installed)",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("workers (docs/workers.md)").add_argument
    add("--jobs", type=number(1), default=1, metavar="N", help="processes that train trials, spread over the GPUs (1)")
    add(
        "--artifacts",
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


def add_report(add: Callable[..., object]) -> None:
    """The arguments that say where results go and what is printed."""
    add("--out", metavar="DIR", help="output folder (results/STUDY); the same command again resumes")
    add("--study-name", metavar="NAME", help="name of the study (made of model, dataset and budget)")
    add("-q", "--quiet", action="store_true", help="print the result alone")
    add("--debug", action="store_true", help="tracebacks and debug messages")


def parse_study(argv: Sequence[str]) -> Settings:
    """Reads the arguments of the main command. Raises NasKdError for bad ones."""
    arguments = vars(study_parser().parse_args(argv))
    # starting over is done once: the same command again resumes
    again = (without_password(argument) for argument in argv if argument != "--new-study")
    arguments["command"] = " ".join(["python -m nas_kd.study", *again])
    arguments["storage"] = arguments["storage"] or os.environ.get(STORAGE)
    return settings_from(arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """The arguments of `python -m nas_kd.worker`. With `leash` it ends when its standard input does."""

    storage: str
    study_name: str
    device: str | None
    out: str | None
    artifacts: str | None
    jobs: int
    grace_period: int
    ray: str | None
    num_gpus: float | None
    wait: int
    leash: bool
    quiet: bool
    debug: bool


def worker_parser(prog: str = "python -m nas_kd.worker") -> argparse.ArgumentParser:
    """The parser of the command that joins a study."""
    parser = Parser(
        prog=prog,
        description="Joins a running study: trains trials beside its other workers until it has what it wants.",
        epilog=f"example: {prog} --storage postgresql+psycopg://me@db/nas --study-name resnet18-digits-params1M",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--storage", metavar="URL", default=os.environ.get(STORAGE), help="the study's storage ($NAS_KD_STORAGE)")
    add("--study-name", metavar="NAME", help="the study (the only one in the storage)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, … (cuda where there is one)")
    add("--out", metavar="DIR", help="folder for what is fetched (the study's own where it is on this machine)")
    add("--wait", type=number(0), default=0, metavar="S", help="wait so many seconds for the study to begin (0)")
    _add_workers(parser)
    add(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="run the --jobs as tasks of a Ray cluster: auto (the one that this machine is of), its address, or local",
    )
    add(
        "--num-gpus",
        type=number(0, float),
        metavar="F",
        help="GPUs that Ray gives to each, also a share of one (1, or 0 in a cluster without)",
    )
    add("--leash", action="store_true", help=argparse.SUPPRESS)
    add("-q", "--quiet", action="store_true", help="print nothing but errors")
    add("--debug", action="store_true", help="tracebacks and debug messages")
    return parser


def parse_worker(argv: Sequence[str]) -> WorkerSettings:
    """Reads the arguments of a worker. Raises NasKdError for bad ones."""
    arguments = vars(worker_parser().parse_args(argv))
    if not arguments["storage"]:
        raise NasKdError("a worker needs the study's storage: give --storage URL, or set NAS_KD_STORAGE")
    if arguments["num_gpus"] is not None and arguments["ray"] is None:
        raise NasKdError("--num-gpus is what Ray gives to a worker: add --ray, or use --device")
    return WorkerSettings(**{**arguments, "study_name": arguments["study_name"] or ""})


def settings_from(arguments: dict[str, Any]) -> Settings:
    """The settings of a study of parsed arguments. Raises NasKdError for bad ones."""
    parse_budget(arguments["budget"])
    parse_levels(arguments["levels"])
    if arguments["study_name"] is not None and not re.search(r"\w", arguments["study_name"]):
        raise NasKdError(f"--study-name {arguments['study_name']!r} needs a letter or digit")
    arguments = {**arguments, **{name: tuple(arguments[name]) for name in ("pin", "start_from")}}
    arguments["pruner"] = _pruner(arguments["pruner"], bool(arguments["maximize"]))
    return Settings(**{field.name: arguments[field.name] for field in fields(Settings)})


def _pruner(name: str | None, single: bool) -> str:
    fitting = PRUNERS[single]
    if name is not None and name not in fitting:
        mode = "one objective (--maximize)" if single else "several objectives (no --maximize)"
        raise NasKdError(f"--pruner {name} does not go with {mode}: use {' or '.join(fitting)}")
    return name or fitting[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """The arguments of `python -m nas_kd.rank_check`: those of the `study` that it speaks of, and its own. A truth sees
    `truth_images`, a proxy `proxy_images`; a score looks at `val_images` of the validation images."""

    study: Settings
    genotypes: int
    band: float
    near: int
    truth_images: int
    proxy_images: int
    val_images: int


def rank_parser(prog: str = "python -m nas_kd.rank_check") -> argparse.ArgumentParser:
    """The parser of the rank check."""
    parser = Parser(
        prog=prog,
        description="How far the ranking of short trainings can be trusted: trains random genotypes for long and tells "
        "how well each score would have ordered them.",
        epilog=f"example: {prog} --budget params=1M --genotypes 10 --truth-images 20000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_base(parser)
    add_data(parser)
    add = parser.add_argument_group("check").add_argument
    add("--budget", required=True, metavar="B", help="around which costs: params=1M,macs=30M or macs=50%% of the base")
    add("--genotypes", type=number(3), default=30, metavar="N", help="random genotypes to train (30)")
    add("--band", type=number(0.001, float, 1), default=0.15, metavar="F", help="how far off the budget (0.15)")
    add("--near", type=number(0), default=0, metavar="N", help="genotypes near the optimum to train as well (0)")
    _add_choices(add)
    _add_library(add)
    add = parser.add_argument_group("training").add_argument
    add("--truth-images", type=number(2), default=102_400, metavar="N", help="images that a truth sees (102400)")
    add("--proxy-images", type=number(8), default=6400, metavar="N", help="images that a short training sees (6400)")
    add("--val-images", type=number(2), default=2000, metavar="N", help="validation images a score looks at (2000)")
    add_recipe(add)
    add_report(parser.add_argument_group("output").add_argument)
    return parser


def parse_rank_check(argv: Sequence[str]) -> RankSettings:
    """Reads the arguments of the rank check. Raises NasKdError for bad ones."""
    arguments = vars(rank_parser().parse_args(argv))
    own = {field.name: arguments.pop(field.name) for field in fields(RankSettings) if field.name != "study"}
    if own["truth_images"] < 2 * own["proxy_images"]:
        raise NasKdError(
            f"--truth-images {own['truth_images']} is no truth beside --proxy-images {own['proxy_images']}: give it at "
            "least twice as many"
        )
    if 0 < own["near"] < 3:
        raise NasKdError(f"--near {own['near']} genotypes have no order to speak of: give at least 3, or 0")
    others = vars(study_parser().parse_args([f"--budget={arguments['budget']}"]))
    command = " ".join(["python -m nas_kd.rank_check", *argv])
    return RankSettings(study=settings_from({**others, **arguments, "command": command}), **own)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceSettings:
    """The arguments of `python -m nas_kd.space`."""

    model: str
    reduction: int | None
    img_size: int | None
    in_chans: int
    num_classes: int | None
    space: str
    search_stages: bool
    pin: tuple[str, ...]
    budget: str | None
    as_json: bool


def parse_space(argv: Sequence[str]) -> SpaceSettings:
    """Reads the arguments of the space command. Raises NasKdError for bad ones."""
    parser = Parser(
        prog="python -m nas_kd.space",
        description="What a timm CNN may become: its blocks, the choices open to each, and what they cost.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm model, or local-dir:FOLDER")
    add("--img-size", type=number(4), metavar="N", help="side of the images in pixels (the model's)")
    add("--reduction", type=number(1), metavar="R", help="total stride of the network; small images need 8 or 4")
    add("--in-chans", type=int, choices=(1, 3), default=3, help="channels of the images (3)")
    add("--num-classes", type=number(1), metavar="N", help="outputs (the model's)")
    _add_choices(add)
    add("--budget", metavar="B", help="tell whether it can be met: params=1M,macs=30M or macs=50%% of the base")
    add("--json", action="store_true", dest="as_json", help="print one JSON object")
    add("--debug", action="store_true", help="tracebacks")
    arguments = vars(parser.parse_args(argv))
    if arguments["budget"]:
        parse_budget(arguments["budget"])
    arguments["pin"] = tuple(arguments["pin"])
    return SpaceSettings(**{field.name: arguments[field.name] for field in fields(SpaceSettings)})


def guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code; a mistake of the user's becomes one line and 2, Ctrl-C 130."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return command(arguments)
    except NasKdError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        sys.stderr.write(f"nas_kd: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("nas_kd: stopped; what is finished is kept, the same command goes on from there\n")
        return 130
