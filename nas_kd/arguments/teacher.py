"""Which network teaches where that is not the base: the arguments, and the value that holds them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nas_kd.arguments.parsing import LOCAL, model_name, number, path
from nas_kd.arguments.parts import argument
from nas_kd.errors import NasKdError


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """A teacher as timm has it (None: the base teaches, or nobody), its weights, and the epochs of what is trained as a
    teacher."""

    model: str | None = argument("teacher", None)
    pretrained: bool = argument("teacher_pretrained", False)
    checkpoint: str | None = argument("teacher_checkpoint", None)
    epochs: int | None = argument("teacher_epochs", None)

    @property
    def is_weighted(self) -> bool:
        """Whether the teacher that is named gets weights from elsewhere."""
        return self.pretrained or self.checkpoint is not None or (self.model or "").startswith(LOCAL)


def add_teacher(parser: argparse.ArgumentParser) -> None:
    """The arguments that name another teacher than the base."""
    add = parser.add_argument_group("another teacher than the base (for the same images)").add_argument
    add(
        "--teacher",
        type=model_name,
        metavar="NAME",
        help="what teaches the students: a timm model, or the folder of an exported one (the base)",
    )
    add_teacher_weights(add)


def add_teacher_weights(add: Callable[..., object]) -> None:
    """Where the weights of a teacher come from."""
    add("--teacher-pretrained", action="store_true", help="take timm's weights for it")
    add(
        "--teacher-checkpoint",
        type=path,
        metavar="FILE",
        help="take these weights for it; without any, it is trained here",
    )


def add_teacher_epochs(add: Callable[..., object]) -> None:
    """How long the teacher is trained."""
    add(
        "--teacher-epochs",
        type=number(1),
        metavar="N",
        help="epochs of the teacher (by the data's size; few from given weights)",
    )


def check_teacher(arguments: Mapping[str, Any]) -> None:
    """Raises NasKdError for weights of a teacher that is not named, or for two sets of weights."""
    given = [name for name in ("teacher_pretrained", "teacher_checkpoint") if arguments[name]]
    if given and arguments["teacher"] is None:
        raise NasKdError(f"--{given[0].replace('_', '-')} speaks of a teacher: name one by --teacher")
    if len(given) > 1:
        raise NasKdError("--teacher-pretrained does not go with --teacher-checkpoint: leave one of them out")
