"""What a student is, as a value: one `Choice` for each block of its base."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nas_kd.errors import GenotypeError
from nas_kd.files.digests import digest_of

VERSION = 1  # of the JSON form; every older one stays readable
CONV_KINDS = ("standard", "depthwise", "blueprint", "shift")  # and group{g}
_GROUP = re.compile(r"group([1-9]\d*)")


def group_count(conv: str) -> int | None:
    """The g of `group{g}`, or None for any other kind of convolution.

    >>> group_count("group4"), group_count("shift")
    (4, None)
    """
    match = _GROUP.fullmatch(conv)
    return int(match[1]) if match else None


def is_conv_kind(conv: str) -> bool:
    """Whether `conv` names a kind of convolution; g of `group{g}` is at least 2."""
    groups = group_count(conv)
    return conv in CONV_KINDS or (groups is not None and groups > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one block becomes.

    Attributes:
        width: The share (0-1] of the base's inner channels that is kept.
        kernel_size: Of its spatial convolutions; None where the block has none that may change.
        conv: Their kind, one of `nas_kd.genotype.CONV_KINDS`; None where the block has none that may change.
        keep: False for a block that is dropped.

    Raises:
        GenotypeError: For a value outside its range.

    Example:
        >>> from nas_kd import Choice
        >>> Choice(width=0.5, kernel_size=3, conv="depthwise").keep
        True
    """

    width: float = 1.0
    kernel_size: int | None = None
    conv: str | None = None
    keep: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise GenotypeError(f"width must lie in (0, 1], got {self.width!r}")
        if self.kernel_size is not None and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise GenotypeError(f"kernel_size must be odd and positive, got {self.kernel_size!r}")
        if self.conv is not None and not is_conv_kind(self.conv):
            known = ", ".join((*CONV_KINDS, "group{g}"))
            raise GenotypeError(f"unknown conv {self.conv!r}: use one of {known}")


@dataclass(frozen=True, slots=True)
class Genotype(Mapping[str, Choice]):
    """A student of a base, as a value: a mapping from block name to `Choice`, in the base's order. Hashable.

    Attributes:
        blocks: (name, choice) pairs.
        digest: Twelve hexadecimal digits that name it; they do not depend on the order of the blocks.

    Example:
        >>> from nas_kd import Choice, Genotype
        >>> genotype = Genotype.of({"layer1.0": Choice(width=0.5), "layer1.1": Choice(keep=False)})
        >>> genotype["layer1.0"].width, Genotype.from_json(genotype.to_json()) == genotype, genotype.digest
        (0.5, True, '6663fc8c7211')
    """

    blocks: tuple[tuple[str, Choice], ...]

    def __post_init__(self) -> None:
        if len({name for name, _ in self.blocks}) != len(self.blocks):
            raise GenotypeError("a genotype names a block twice")

    @classmethod
    def of(cls, choices: Mapping[str, Choice]) -> Genotype:
        """The genotype with these choices, in this order."""
        return cls(tuple(choices.items()))

    def __getitem__(self, block: str) -> Choice:
        for name, choice in self.blocks:
            if name == block:
                return choice
        raise KeyError(block)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def to_json(self) -> str:
        """The genotype as one line of JSON with a version, fields at their default left out."""
        blocks = {name: _plain(choice) for name, choice in self.blocks}
        return json.dumps({"version": VERSION, "blocks": blocks}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Reads what `to_json` wrote. Raises GenotypeError for anything else."""
        try:
            data = json.loads(text)
            version, blocks = data["version"], data["blocks"]
            if version != VERSION:
                raise GenotypeError(
                    f"this genotype has version {version!r}, this nas_kd reads up to {VERSION}: update it"
                )
            return cls.of({name: Choice(**fields) for name, fields in blocks.items()})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise GenotypeError(f"not a genotype: {text[:80]!r} ({error})") from error

    @property
    def digest(self) -> str:
        """The first 12 hex digits of the SHA-256 of the canonical JSON (blocks sorted by name)."""
        blocks = {name: _plain(choice) for name, choice in sorted(self.blocks)}
        return digest_of(json.dumps(blocks, sort_keys=True), 12)


def _plain(choice: Choice) -> dict[str, Any]:
    default = asdict(Choice())
    return {field: value for field, value in asdict(choice).items() if value != default[field]}
