"""The arguments of `python -m nas_kd.distill`."""

from __future__ import annotations

import argparse
import ast
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nas_kd.arguments.augment import add_augmentation, augment_options
from nas_kd.arguments.data import DataSettings, add_data, add_reading
from nas_kd.arguments.network import NetworkSettings, add_shape
from nas_kd.arguments.output import add_quiet
from nas_kd.arguments.parsing import Parser, command_line, model_name, number, path
from nas_kd.arguments.parts import defaults, part, read
from nas_kd.arguments.teacher import TeacherSettings, add_teacher_epochs, add_teacher_weights, check_teacher
from nas_kd.arguments.training import RATE, add_device
from nas_kd.data.dataset_names import choose_dataset
from nas_kd.errors import NasKdError

LOSSES = ("kd", "dkd")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """The arguments of `python -m nas_kd.distill`, checked as far as that is possible without torch.

    `mode` is `online`, `offline` (then there is a teacher) or `plain`. `model_kwargs` go to `timm.create_model`.
    """

    network: NetworkSettings = part(NetworkSettings)
    data: DataSettings = part(DataSettings)
    teacher: TeacherSettings = part(TeacherSettings)
    mode: str
    model_kwargs: tuple[tuple[str, Any], ...] = ()
    conv: str | None = None
    from_scratch: bool = False
    peers: int = 4
    teacher_gradient: bool = False
    class_mean: bool = False
    views: int = 8
    loss: str = "kd"
    distill_weight: float = 0.9
    temperature: float = 4.0
    epochs: int | None = None
    batch_size: int = 64
    lr: float | None = None
    optimizer: str = "sgd"
    schedule: str = "one-cycle"
    weight_decay: float = 5e-4
    device: str | None = None
    amp: bool = False
    out: str | None = None
    cache: str | None = None
    quiet: bool = False
    debug: bool = False
    command: str = ""

    @property
    def has_weights(self) -> bool:
        """Whether the student starts from given weights."""
        given = self.network.is_weighted or self.network.is_exported
        return given and not self.from_scratch and self.mode != "online"

    @property
    def stem(self) -> str:
        """A short name of the model: with its arguments and its kind of convolution; of an exported one without path,
        params and accuracy."""
        name = self.network.model
        if self.network.is_exported:
            name = re.sub(r"-\d+\.\d\dM-\d+\.\d.*$", "", self.network.folder.resolve().name)
        words = [name, *(str(value) for _, value in self.model_kwargs), *([self.conv] if self.conv else [])]
        return re.sub(r"[^\w.%+-]+", "-", "-".join(words)).strip("-.")


def distill_parser(prog: str = "python -m nas_kd.distill") -> argparse.ArgumentParser:
    """The parser of the distill command."""
    parser = Parser(
        prog=prog,
        description="Trains one small model: online beside its peers, offline beside a teacher, or plainly.",
        epilog=f"example: {prog} resnet18 --conv depthwise --online     (no data, network or GPU needed)",
    )
    _add_model(parser.add_argument_group("model (as in timm)").add_argument)
    _add_mode(parser)
    add_data(parser)
    add_augmentation(parser)
    _add_recipe(parser.add_argument_group("training").add_argument)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=path, metavar="DIR", help="output folder (results/distill-…); the same command again resumes")
    add(
        "--cache",
        type=path,
        metavar="DIR",
        help="images, views, teachers and states, shared by several trainings (OUT/cache)",
    )
    add_quiet(add)
    parser.take_defaults(defaults(DistillSettings))
    return parser


def _add_model(add: Callable[..., object]) -> None:
    add("model", type=model_name, metavar="MODEL", help="a timm model, or a folder that a study exported")
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the model, e.g. conv=shift")
    add("--conv", metavar="KIND", help="make each convolution that can be depthwise, blueprint, shift or group4")
    add("--pretrained", action="store_true", help="start from timm's weights")
    add("--initial-checkpoint", type=path, metavar="FILE", help="start from these weights (.safetensors, .pth)")
    add("--from-scratch", action="store_true", help="start an exported model from new weights, not from its own")
    add_shape(add)


def _add_mode(parser: argparse.ArgumentParser) -> None:
    mode = parser.add_argument_group("one of these").add_mutually_exclusive_group(required=True)
    mode.add_argument("--online", action="store_true", help="peers from scratch, and a teacher built from them")
    mode.add_argument(
        "--teacher", type=model_name, metavar="NAME", help="beside this teacher: a timm model or an exported folder"
    )
    mode.add_argument("--no-teacher", action="store_true", help="plain training, to compare with")
    add = parser.add_argument_group("online distillation").add_argument
    add("--peers", type=number(2), metavar="N", help="students that learn together (%(default)s)")
    add("--teacher-gradient", action="store_true", help="the soft loss moves the teacher too (the authors' code)")
    add("--class-mean", action="store_true", help="average the soft loss over classes too (the authors' code)")
    add = parser.add_argument_group("offline distillation").add_argument
    add_teacher_weights(add)
    add_teacher_epochs(add)
    add("--views", type=number(0), metavar="N", help="augmented views with cached logits; 0: always new (%(default)s)")
    add(
        "--distill-weight",
        type=number(0, float, 1 + 1e-9),
        metavar="F",
        help="share of the soft loss, the rest is cross-entropy (%(default)s); online everything weighs 1",
    )
    add = parser.add_argument_group("soft loss").add_argument
    add("--loss", choices=LOSSES, help="logit KD or decoupled KD (%(default)s)")
    add("--temperature", type=number(1e-3, float), metavar="T", help="softens the logits (%(default)s)")


def _add_recipe(add: Callable[..., object]) -> None:
    add("--epochs", type=number(1), metavar="N", help="epochs (by the data's size)")
    add("--batch-size", type=number(2), metavar="N", help="images per step (%(default)s)")
    add("--lr", type=RATE, metavar="F", help="peak learning rate (0.005 from given weights, 0.03 from scratch)")
    add("--optimizer", choices=("sgd", "adamw"), help="(%(default)s)")
    add("--schedule", choices=("one-cycle", "cosine", "step", "constant"), help="(%(default)s)")
    add("--weight-decay", type=number(0, float, math.inf), metavar="F", help="(5e-4)")
    add_device(add)
    add_reading(add)


def parse_distill(argv: Sequence[str]) -> DistillSettings:
    """Reads the arguments of the distill command. Raises NasKdError for bad ones."""
    arguments = vars(distill_parser().parse_args(argv))
    arguments["mode"] = "online" if arguments["online"] else "plain" if arguments["no_teacher"] else "offline"
    arguments["model_kwargs"] = tuple(map(_pair, arguments["model_kwargs"]))
    _check_weights(arguments)
    arguments["dataset"] = choose_dataset(arguments["dataset"], arguments["data_dir"])
    arguments["augment"] = augment_options(arguments, arguments["loss"])
    arguments["command"] = command_line("python -m nas_kd.distill", argv)
    return read(DistillSettings, arguments)


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise NasKdError(f"cannot read --model-kwargs {text!r}: write key=value, e.g. conv=shift")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _check_weights(arguments: dict[str, Any]) -> None:
    given = next(
        (f"--{name.replace('_', '-')}" for name in ("pretrained", "initial_checkpoint") if arguments[name]), ""
    )
    if given and arguments["mode"] == "online":
        raise NasKdError(f"{given} does not go with --online: every peer starts from weights of its own; leave it out")
    if given and arguments["from_scratch"]:
        raise NasKdError(f"{given} does not go with --from-scratch: leave one of them out")
    check_teacher(arguments)
    if arguments["teacher_epochs"] and arguments["teacher"] is None:
        raise NasKdError("--teacher-epochs speaks of a teacher: name one by --teacher")
    for name in ("teacher_gradient", "class_mean"):
        if arguments[name] and arguments["mode"] != "online":
            raise NasKdError(f"--{name.replace('_', '-')} is a switch of --online: leave it out")
