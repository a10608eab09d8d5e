"""How networks are trained: the arguments, and the values that hold them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nas_kd.arguments.parsing import number
from nas_kd.arguments.parts import argument

RATE = number(1e-9, float, math.inf)  # a learning rate
DISTILLATIONS = ("kd", "dkd", "online")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """What all trainings of students have in common."""

    batch_size: int = 64
    lr: float = 0.005
    views: int = 8
    device: str | None = None
    amp: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """The short trainings that a search ranks students by."""

    epochs: int = argument("proxy_epochs", 4)
    images: int = argument("proxy_images", 10_000)
    lr: float | None = argument("proxy_lr", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementSettings:
    """The long trainings of the models of the results: at most `front` of them, and baselines."""

    epochs: int | None = argument("refine_epochs", None)
    distill: str = "kd"
    peers: int = 4
    front: int = 8
    baselines: bool = True


def add_recipe(add: Callable[..., object]) -> None:
    """The arguments that all trainings of students have in common."""
    add("--batch-size", type=number(2), metavar="N", help="images per step (%(default)s)")
    add("--lr", type=RATE, metavar="F", help="peak learning rate of students (%(default)s)")
    add("--views", type=number(1), metavar="N", help="augmented views with cached teacher logits (%(default)s)")
    add_device(add)


def add_device(add: Callable[..., object]) -> None:
    """Where networks are trained, and how exactly."""
    add("--device", metavar="D", help="cpu, cuda, cuda:1, … (cuda where there is one)")
    add("--amp", action="store_true", help="mixed precision")


def add_proxies(add: Callable[..., object]) -> None:
    """The arguments of the short trainings."""
    add(
        "--proxy-epochs",
        type=number(1),
        metavar="N",
        help=f"epochs of a trial, at most ({ProxySettings().epochs}; fewer where they would take minutes)",
    )
    add(
        "--proxy-images",
        type=number(2),
        metavar="N",
        help=f"training images of a trial ({ProxySettings().images}; fewer where they would take minutes)",
    )
    add_proxy_rate(add)


def add_proxy_rate(add: Callable[..., object]) -> None:
    """How fast the short trainings are that a search ranks students by."""
    add("--proxy-lr", type=RATE, metavar="F", help="peak learning rate of a trial (0.4 of --lr)")


def add_refinement(add: Callable[..., object]) -> None:
    """The arguments of the long trainings."""
    add("--refine-epochs", type=number(1), metavar="N", help="epochs of the front's models (by the data's size)")
    add(
        "--distill",
        choices=DISTILLATIONS,
        help="how the front's models learn: by logit KD or decoupled KD from the teacher, or online, each with its"
        " peers from scratch (%(default)s)",
    )
    add("--peers", type=number(2), metavar="N", help="students that learn together, with online (%(default)s)")


def add_baselines(add: Callable[..., object]) -> None:
    """Whether anything is trained to compare with."""
    add(
        "--no-baselines",
        dest="baselines",
        action="store_false",
        help="train no models to compare with: the same without a teacher, one width everywhere, a random one",
    )
