"""The arguments of `python -m nas_kd.study`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nas_kd import __version__
from nas_kd.arguments.augment import AugmentOptions, add_augmentation, augment_options
from nas_kd.arguments.images import ImageSettings
from nas_kd.arguments.parsing import Parser, command_line, number, path, storage
from nas_kd.arguments.shared import (
    SPACE,
    STAGES,
    add_accelerator,
    add_base,
    add_baselines,
    add_choices,
    add_data,
    add_library,
    add_onnx,
    add_proxy_rate,
    add_recipe,
    add_report,
    add_storage,
    add_workers,
    check_teacher,
)
from nas_kd.budget import ACCELERATOR, parse_budget, parse_levels
from nas_kd.data.dataset_names import choose_dataset
from nas_kd.errors import NasKdError, nearest, without_password
from nas_kd.spelling import plain_budget

STORAGE = "NAS_KD_STORAGE"  # environment variable: a URL with a password is not for every eye on the machine
DISTILLATIONS = ("kd", "dkd", "online")
RUNTIMES = ("onnx", "torch")  # that time a network
SAMPLERS = ("knapsack", "tpe", "nsgaii", "nsgaiii", "random")
# what is done by default, of an effort at most
OPEN = {
    "proxy_epochs": 4,
    "proxy_images": 10_000,
    "front": 8,
    "space": SPACE,
    "search_stages": STAGES,
    "base_bounds": True,
}
PRUNERS = {False: ("front", "none"), True: ("sha", "hyperband", "median", "none")}  # with one objective: Optuna's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ImageSettings):
    """The arguments of `python -m nas_kd.study`, checked as far as that is possible without torch."""

    reduction: int | None
    in_chans: int | None
    budget: str
    levels: str
    latency_runtime: str | None
    latency_device: str
    latency_batch: int
    latency_threads: int
    latency_command: str
    latency_timeout: int
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
    out: str | None
    study_name: str | None
    storage: str | None
    onnx: bool | None = None
    jobs: int = 1
    artifacts: str | None = None
    grace_period: int = 120
    new_study: bool = False
    start_from: tuple[str, ...] = ()
    command: str = ""
    maximize: str | None = None
    proxy_lr: float | None = None
    accelerator: str = ACCELERATOR
    pruner: str = "front"
    teacher: str | None = None
    teacher_pretrained: bool = False
    teacher_checkpoint: str | None = None
    base_bounds: bool = False
    channel_multiple: int = 8
    int8: bool = False
    baselines: bool = True
    left_open: tuple[str, ...] = ()  # of `OPEN`: as the study began, or chosen in `preparation`

    @property
    def name(self) -> str:
        """The study's name: as given, or model, dataset and budget."""
        text = self.study_name or f"{self.model}-{self.dataset}-{self.budget.replace('=', '')}"
        return re.sub(r"[^\w.%+-]+", "-", text).strip("-.")


def restore_settings(kept: Mapping[str, Any]) -> Settings:
    """Settings that were written as JSON, by this version or an earlier one."""
    tuples = {name: tuple(kept.get(name, ())) for name in ("pin", "left_open", "start_from")}
    return Settings(**{**kept, **tuples, "augment": AugmentOptions.restore(kept.get("augment"))})


def study_parser(prog: str = "python -m nas_kd.study") -> argparse.ArgumentParser:
    """The parser of the main command."""
    parser = Parser(
        prog=prog,
        description="Any timm CNN in, a family of smaller timm CNNs out, each within a hard budget.",
        epilog=f"example: {prog} --budget params=1M     (no data, network or GPU needed)",
    )
    parser.add_argument("--version", action="version", version=f"nas_kd {__version__}")
    add_base(parser)
    add_data(parser)
    add_augmentation(parser)
    _add_search(parser)
    _add_training(parser)
    _add_output(parser)
    return parser


def _add_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    add = group.add_argument
    add(
        "--budget",
        required=True,
        metavar="B",
        help="hard upper bounds: params=1M,macs=30M,latency=4ms,cycles=400K or macs=50%% of the base",
    )
    add("--levels", default="1", metavar="L", help="shares of the budget that get a best model each: 0.25,0.5,1 (1)")
    add(
        "--base-bounds",
        action=argparse.BooleanOptionalAction,
        help="what --budget leaves out of params, MACs, peak memory and latency is bounded by the base's own (yes)",
    )
    _add_latency(add)
    add_accelerator(add)
    add("--trials", type=number(1), default=20, metavar="N", help="students to train; over-budget ones are free (20)")
    add_choices(add)
    parser.set_defaults(space=None, search_stages=None)  # as the study began
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
    add_library(add)
    add(
        "--start-from",
        action="append",
        type=path,
        default=[],
        metavar="FILE",
        help="begin with the genotype in this file too: structure.json of nas_kd.structure (repeatable)",
    )
    add(
        "--front",
        type=number(1),
        metavar="N",
        help="refine at most so many students of the front (8; 5 where images are dear)",
    )


def _sampler(text: str) -> str:
    """The type of --sampler: a short name, or the path of the user's own, which is imported later."""
    if text not in SAMPLERS and not re.fullmatch(r"[^\W\d][\w.]*[.:][^\W\d]\w*", text):
        hint = nearest(text, SAMPLERS)
        raise argparse.ArgumentTypeError(
            f"unknown sampler {text!r}: use {', '.join(SAMPLERS)}, or package.module:Class of your own{hint}"
        )
    return text


def _add_latency(add: Callable[..., object]) -> None:
    add(
        "--latency-runtime",
        choices=RUNTIMES,
        help="what runs a network while it is timed: onnx (ONNX Runtime) or torch (onnx)",
    )
    add("--latency-device", default="cpu", metavar="D", help="where it is timed: cpu, cuda, cuda:1, … (cpu)")
    add("--latency-batch", type=number(1), default=1, metavar="N", help="images that go through it at once (1)")
    add("--latency-threads", type=number(1), default=1, metavar="N", help="CPU threads that it may use (1)")
    add(
        "--latency-command",
        default="",
        metavar="CMD",
        help="a command of yours that is given an ONNX file and prints the milliseconds of one forward pass",
    )
    add("--latency-timeout", type=number(1), default=600, metavar="S", help="seconds that this command may take (600)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add(
        "--proxy-epochs",
        type=number(1),
        metavar="N",
        help="epochs of a trial, at most (4; fewer where they would take minutes)",
    )
    add(
        "--proxy-images",
        type=number(2),
        metavar="N",
        help="training images of a trial (10000; fewer where they would take minutes)",
    )
    add_proxy_rate(add)
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


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add_report(add)
    add_baselines(add)
    add_onnx(add)
    add("--int8", action="store_true", help="write the front's models and the teacher as int8 too, and measure them")
    add("--new-study", action="store_true", help="begin anew under this name; the study that had it is kept")
    add_storage(add)
    add_workers(parser)


def parse_study(argv: Sequence[str]) -> Settings:
    """Reads the arguments of the main command. Raises NasKdError for bad ones."""
    arguments = vars(study_parser().parse_args(argv))
    # starting over is done once: the same command again resumes
    again = (without_password(argument) for argument in argv if argument != "--new-study")
    arguments["command"] = command_line("python -m nas_kd.study", list(again))
    arguments["storage"] = arguments["storage"] or storage_of_environment()
    return settings_from(arguments)


def settings_like(asked: Mapping[str, Any], command: str, **fixed: Any) -> Settings:
    """The settings of the study that a command with fewer arguments stands for: what was `asked` there, what it has
    `fixed`, and a study's defaults for all else. Raises NasKdError for bad ones."""
    defaults = vars(study_parser().parse_args([f"--budget={asked['budget']}"]))
    return settings_from({**defaults, **fixed, **asked, "command": command})


def storage_of_environment() -> str | None:
    """What $NAS_KD_STORAGE names. Raises NasKdError for what is no storage."""
    try:
        return storage(os.environ.get(STORAGE, "")) or None
    except argparse.ArgumentTypeError as error:
        raise NasKdError(f"{STORAGE}: {error}") from None


def settings_from(arguments: dict[str, Any]) -> Settings:
    """The settings of a study of parsed arguments. Raises NasKdError for bad ones."""
    parse_budget(arguments["budget"])
    arguments["budget"] = plain_budget(arguments["budget"])  # which names the study too
    parse_levels(arguments["levels"])
    if arguments["study_name"] is not None and not re.search(r"\w", arguments["study_name"]):
        raise NasKdError(f"--study-name {arguments['study_name']!r} needs a letter or digit")
    check_teacher(arguments)
    arguments = {**arguments, **{name: tuple(arguments[name]) for name in ("pin", "start_from")}}
    arguments["dataset"] = choose_dataset(arguments["dataset"], arguments["data_dir"])
    arguments["left_open"] = tuple(name for name in OPEN if arguments[name] is None)
    arguments |= {name: OPEN[name] for name in arguments["left_open"]}
    arguments["pruner"] = _pruner(arguments["pruner"], bool(arguments["maximize"]))
    arguments["augment"] = augment_options(arguments, arguments["distill"])
    return Settings(**{field.name: arguments[field.name] for field in fields(Settings)})


def _pruner(name: str | None, single: bool) -> str:
    fitting = PRUNERS[single]
    if name is not None and name not in fitting:
        mode = "one objective (--maximize)" if single else "several objectives (no --maximize)"
        raise NasKdError(f"--pruner {name} does not go with {mode}: use {' or '.join(fitting)}")
    return name or fitting[0]
