"""Which network a command is about: the arguments, and the value that holds them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nas_kd.arguments.parsing import LOCAL, model_name, number, path


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """A network as timm has it, the weights it begins with, and what it reads."""

    model: str = "resnet18"
    pretrained: bool = False
    initial_checkpoint: str | None = None
    img_size: int | None = None
    reduction: int | None = None
    in_chans: int | None = None

    @property
    def is_weighted(self) -> bool:
        """Whether the network begins with weights from elsewhere."""
        return self.pretrained or self.initial_checkpoint is not None

    @property
    def is_exported(self) -> bool:
        """Whether it is a folder that a study wrote, which brings weights."""
        return self.model.startswith(LOCAL)

    @property
    def folder(self) -> Path:
        """Of an exported one."""
        return Path(self.model.removeprefix(LOCAL))


def add_base(parser: argparse.ArgumentParser) -> None:
    """The arguments that name the base of a study."""
    add = parser.add_argument_group("base and teacher (as in timm)").add_argument
    add(
        "--model",
        type=model_name,
        metavar="NAME",
        help="timm model to search from, or the folder of an exported one (%(default)s)",
    )
    add("--pretrained", action="store_true", help="take timm's weights as the teacher's")
    add(
        "--initial-checkpoint",
        type=path,
        metavar="FILE",
        help="take these weights as the teacher's (.safetensors, .pth)",
    )
    add_shape(add)


def add_shape(add: Callable[..., object]) -> None:
    """The arguments that say what a network reads and writes."""
    add("--reduction", type=number(1), metavar="R", help="total stride of the network; small images need 8 or 4")
    add("--img-size", type=number(4), metavar="N", help="side of the images in pixels (the model's; digits: 16)")
    add("--in-chans", type=int, choices=(1, 3), help="channels of the images (3; digits: 1)")
    add("--num-classes", type=number(2), metavar="N", help="outputs (as many as the data has classes)")
