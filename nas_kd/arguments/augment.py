"""How training images are augmented, mixed and labelled: the options of timm's `train.py`, by its names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nas_kd.arguments.parsing import number
from nas_kd.data.augmentation_names import ERASE_MODES, INTERPOLATIONS
from nas_kd.errors import NasKdError

_SHARE = number(0, float, 1 + 1e-9)
_CROPPING = ("scale", "ratio", "vflip", "color_jitter", "aa", "train_interpolation", "reprob")  # what makes it timm's


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentOptions:
    """The options as given; None where the data's size and kind decide, or timm's default holds."""

    no_aug: bool = False
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    hflip: float | None = None
    vflip: float | None = None
    color_jitter: float | None = None
    aa: str | None = None
    train_interpolation: str | None = None
    reprob: float | None = None
    remode: str | None = None
    mixup: float | None = None
    cutmix: float | None = None
    mixup_prob: float | None = None
    mixup_switch_prob: float | None = None
    smoothing: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, by their names in Python."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}

    @property
    def text(self) -> str | None:
        """The options that were given, as a command has them; None when there are none."""
        return " ".join(f"{_option(name)} {_shown(value)}" for name, value in self.given.items()) or None

    @property
    def crops(self) -> bool:
        """Whether timm's transforms are asked for, whatever the size and kind of the images."""
        return any(name in _CROPPING for name in self.given)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return bool(self.mixup or self.cutmix)

    @property
    def softens(self) -> bool:
        """Whether labels become shares of several classes."""
        return self.mixes or bool(self.smoothing)

    @classmethod
    def restore(cls, noted: Mapping[str, Any] | None) -> AugmentOptions:
        """The options that `dataclasses.asdict` and JSON had made a mapping of; none of nothing."""
        values = dict(noted or {})
        pairs = {name: tuple(values[name]) for name in ("scale", "ratio") if values.get(name) is not None}
        return cls(**{**values, **pairs})


def add_augmentation(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how training images are augmented."""
    add = parser.add_argument_group(
        "augmentation (timm's options; by default a random crop and flip for photos of 64 pixels or more, shift and "
        "flip for smaller images, no flip for digits and letters)"
    ).add_argument
    add("--no-aug", action="store_true", help="train on the images as they are")
    add(
        "--scale",
        nargs=2,
        type=_SHARE,
        metavar="F",
        help="share of the area that a random crop has (0.7 1; timm's 0.08 1 takes long trainings)",
    )
    add("--ratio", nargs=2, type=number(1e-3, float), metavar="F", help="its aspect ratio (0.75 1.33)")
    add("--train-interpolation", choices=INTERPOLATIONS, help="how it is resized (random: bilinear or bicubic)")
    add("--hflip", type=_SHARE, metavar="P", help="probability of a horizontal flip (0.5; digits and letters: 0)")
    add("--vflip", type=_SHARE, metavar="P", help="probability of a vertical flip (0)")
    add("--color-jitter", type=number(0, float), metavar="F", help="change of brightness, contrast and saturation (0)")
    add("--aa", metavar="NAME", help="AutoAugment policy, e.g. rand-m9-mstd0.5, augmix-m3 or original (none)")
    add("--reprob", type=_SHARE, metavar="P", help="probability of random erasing (0)")
    add("--remode", choices=ERASE_MODES, help="what fills it: the mean, one random colour, or noise (pixel)")
    add("--mixup", type=number(0, float), metavar="A", help="mixup alpha, of students alone; 0: none (0)")
    add("--cutmix", type=number(0, float), metavar="A", help="cutmix alpha, 0: none (0)")
    add("--mixup-prob", type=_SHARE, metavar="P", help="probability that an image is mixed (1)")
    add("--mixup-switch-prob", type=_SHARE, metavar="P", help="of cutmix where both are given (0.5)")
    add("--smoothing", type=number(0, float, 1), metavar="F", help="label smoothing, of students alone (0)")


def augment_options(arguments: Mapping[str, Any], soft_loss: str) -> AugmentOptions:
    """The options among parsed arguments, beside the soft loss of that name. Raises NasKdError for options that do not
    go together."""
    values = {field.name: arguments[field.name] for field in fields(AugmentOptions)}
    for name in ("scale", "ratio"):
        if values[name] is not None:
            values[name] = _pair(name, values[name])
    options = AugmentOptions(**values)
    _check(options, soft_loss)
    return options


def _pair(name: str, values: list[float]) -> tuple[float, float]:
    low, high = values
    if not 0 < low <= high:
        raise NasKdError(f"{_option(name)} {low:g} {high:g}: give the lower one first, above 0")
    return low, high


def _check(options: AugmentOptions, soft_loss: str) -> None:
    given = [name for name in options.given if name in (*_CROPPING, "hflip", "remode")]
    if options.no_aug and given:
        raise NasKdError(f"--no-aug does not go with {_option(given[0])}: leave one of them out")
    if options.remode is not None and not options.reprob:
        raise NasKdError("--remode says what fills an erased part: give --reprob above 0 too")
    if options.color_jitter and options.aa is not None and "3a" not in options.aa:
        raise NasKdError("--color-jitter does not go with --aa, beside which timm leaves it out: give one of them")
    for name, others in (("mixup_prob", ("mixup", "cutmix")), ("mixup_switch_prob", ("mixup", "cutmix"))):
        needed = all if name == "mixup_switch_prob" else any
        if name in options.given and not needed(options.given.get(other) for other in others):
            words = " and " if needed is all else " or "
            raise NasKdError(f"{_option(name)} needs {words.join(map(_option, others))} above 0")
    if soft_loss == "dkd" and options.softens:
        name = next(name for name in ("mixup", "cutmix", "smoothing") if options.given.get(name))
        raise NasKdError(f"{_option(name)} does not go with dkd, which needs one class per image: use kd instead")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    if value is True:
        return ""
    return " ".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)
