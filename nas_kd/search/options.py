"""Which choices a user leaves open: `--space width,kernel,conv,keep`, `--pin layer1.*:conv=standard` and
`--search-stages`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nas_kd.analysis.structure import ROUND_TO, Analysis, Block
from nas_kd.errors import GenotypeError, nearest
from nas_kd.genotype import Choice, is_conv_kind

DEFAULT = ("width", "kernel", "conv")  # what is open when nothing is said
DIMENSIONS = (*DEFAULT, "keep")
FAST = "fast"  # conv=fast: the kinds that save time wherever they save anything, docs/decisions.md
_FAST_KINDS = ("standard", "depthwise", "blueprint")
_YES_NO = {"yes": True, "no": False}
_FIELDS: Mapping[str, Callable[[Choice], object]] = {
    "width": lambda choice: choice.width,
    "kernel": lambda choice: choice.kernel_size,
    "conv": lambda choice: choice.conv,
    "keep": lambda choice: choice.keep,
}


@dataclass(frozen=True, slots=True)
class Pin:
    """For every block whose name fits `pattern`, the values that stay open in one dimension."""

    pattern: str
    dimension: str
    values: tuple[object, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Options:
    """The open dimensions, each with the values it is limited to (none: all), and pins that limit single blocks; and
    whether each residual stream gets a width too. Of many channels a multiple of `channel_multiple` stays."""

    open: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: {name: () for name in DEFAULT})
    pins: tuple[Pin, ...] = ()
    search_stages: bool = False
    channel_multiple: int = ROUND_TO

    @property
    def aspects(self) -> frozenset[str]:
        """What `analyse` has to open for these options."""
        pinned = {pin.dimension for pin in self.pins}
        keep = {"keep"} & (self.open.keys() | pinned)
        return frozenset({*DEFAULT, *keep, *(["stages"] if self.search_stages else [])})


def parse_options(
    space: str = ",".join(DEFAULT),
    pins: Sequence[str] = (),
    *,
    search_stages: bool = False,
    channel_multiple: int = ROUND_TO,
) -> Options:
    """Reads which choices are open, as people write it.

    Args:
        space: Aspects such as `width,conv=standard/depthwise`, each alone or limited to some values. `conv=fast` limits
            kinds to those that save time, where a block offers any of them; `keep` lets blocks around an identity
            shortcut be dropped.
        pins: Limits for some blocks, such as `layer1.*:conv=standard` or `conv1:width=0.5/1`.
        search_stages: Whether each residual stream has a width of its own.
        channel_multiple: Of many channels a multiple of it stays.

    Returns:
        The options, for `Space`.

    Raises:
        GenotypeError: For what is none; it says how to write it.

    Example:
        >>> from nas_kd import parse_options
        >>> sorted(parse_options("width=1/0.5,keep").open)
        ['keep', 'width']
    """
    parts = [part.strip() for part in space.split(",") if part.strip()]
    if not parts:
        raise GenotypeError(f"the space is empty: open at least one of {', '.join(DIMENSIONS)}")
    opened: dict[str, tuple[object, ...]] = {}
    for part in parts:
        name, _, values = part.partition("=")
        opened[_dimension(name)] = _values(name, values) if values else ()
    return Options(opened, tuple(_pin(pin) for pin in pins), search_stages, channel_multiple)


def _dimension(name: str) -> str:
    if name not in DIMENSIONS:
        raise GenotypeError(f"unknown dimension {name!r}: use {', '.join(DIMENSIONS)}{nearest(name, DIMENSIONS)}")
    return name


def _values(dimension: str, text: str) -> tuple[object, ...]:
    if dimension == "conv" and text.strip() == FAST:
        return _FAST_KINDS
    return tuple(_value(dimension, word.strip()) for word in text.split("/"))


def _value(dimension: str, word: str) -> object:
    try:
        if dimension == "width":
            return float(word)
        if dimension == "kernel":
            return int(word)
        if dimension == "keep":
            return _YES_NO[word]
    except KeyError as error:
        raise GenotypeError(f"cannot read keep={word}: write yes or no") from error
    except ValueError as error:
        raise GenotypeError(f"cannot read the {dimension} {word!r}: write a number, as in {dimension}=…/…") from error
    if not is_conv_kind(word):
        raise GenotypeError(f"unknown conv {word!r}: use standard, depthwise, blueprint, shift, group4, or fast alone")
    return word


def _pin(text: str) -> Pin:
    pattern, colon, rest = text.rpartition(":")
    dimension, equals, values = rest.partition("=")
    if not (colon and equals and pattern and values):
        raise GenotypeError(f"cannot read the pin {text!r}: write it like 'layer1.*:conv=standard'")
    return Pin(pattern, _dimension(dimension), _values(dimension, values), text)


def restrict(analysis: Analysis, options: Options) -> Analysis:
    """The analysis with only the choices that `options` leave open; what is not opened stays as in the base.

    Raises GenotypeError for a pin that fits no block, and where nothing is left of a block because a value is not
    offered there or two pins contradict each other.
    """
    for pin in options.pins:
        if not any(fnmatch.fnmatchcase(block.name, pin.pattern) for block in analysis.blocks):
            names = [block.name for block in analysis.blocks]
            hint = nearest(pin.pattern, names)
            raise GenotypeError(f"the pin {pin.text!r} fits no block{hint}; blocks are {', '.join(names)}")
    for name, values in options.open.items():
        _check_offered(analysis, name, values)
    return replace(analysis, blocks=tuple(_restrict_block(block, options) for block in analysis.blocks))


def _check_offered(analysis: Analysis, name: str, values: Sequence[object]) -> None:
    """Raises GenotypeError for a listed value that no block offers: it would be passed over in silence."""
    if values == _FAST_KINDS:  # whatever of them a block offers
        return
    offered = dict.fromkeys(_FIELDS[name](choice) for block in analysis.blocks for choice in block.choices)
    for value in values:
        if value not in offered:
            known = ", ".join(str(other) for other in offered if other is not None)
            raise GenotypeError(f"no block of {analysis.name} offers {name}={value}: use {known}")


def _restrict_block(block: Block, options: Options) -> Block:
    choices, dropped = block.choices, tuple(choice for choice in block.choices if not choice.keep)
    for name, value_of in _FIELDS.items():
        pins = [pin for pin in options.pins if pin.dimension == name and fnmatch.fnmatchcase(block.name, pin.pattern)]
        if name == "keep":  # a dropped block has no width, kernel or kind: what limits those does not touch it
            choices = tuple(dict.fromkeys((*choices, *dropped)))
        if pins:
            choices = _pinned(block, choices, name, pins)
        elif options.search_stages and block.is_stream:
            continue
        elif name not in options.open:
            choices = tuple(choice for choice in choices if value_of(choice) == value_of(block.default))
        elif allowed := options.open[name]:
            kept = tuple(choice for choice in choices if value_of(choice) in allowed)
            # a block that offers none of the values (a 1×1 convolution has no kernel to choose) stays as it is
            choices = kept or tuple(choice for choice in choices if value_of(choice) == value_of(block.default))
    return replace(block, choices=choices)


def _pinned(block: Block, choices: tuple[Choice, ...], name: str, pins: Sequence[Pin]) -> tuple[Choice, ...]:
    value_of = _FIELDS[name]
    kept = tuple(choice for choice in choices if all(value_of(choice) in pin.values for pin in pins))
    if not kept:
        offered = ", ".join(str(value) for value in dict.fromkeys(map(value_of, block.choices)))
        texts = " and ".join(repr(pin.text) for pin in pins)
        raise GenotypeError(f"{texts} leave nothing of block {block.name}: its {name} can be {offered}")
    return kept
