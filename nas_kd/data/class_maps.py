"""Which class has which number, in a file of timm's --class-map."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from nas_kd.errors import DataError, nearest

_logger = logging.getLogger(__name__)


def read_class_map(file: str, root: Path) -> dict[str, int]:
    """Class to number, from a text file with one class per line in the order of the numbers, or from JSON: a list of
    classes, or an object with each one's number. Like timm's, the file may lie in the data folder `root`.

    Raises DataError when it cannot be read, names a class twice, or leaves a number out.
    """
    path = next((path for path in (Path(file), root / file) if path.is_file()), None)
    if path is None:
        raise DataError(f"there is no class map {file}, nor one in {root}")
    try:
        text = path.read_text(encoding="utf-8")
        read = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the class map {path}: {error}") from error
    numbers = _numbered(read)
    if numbers is None or sorted(numbers.values()) != list(range(len(numbers))) or not numbers:
        raise DataError(
            f"the class map {path} must give the numbers 0, 1, … to classes, each once: one class per line, or a JSON "
            'list of them, or {"class": number}'
        )
    return numbers


def _numbered(read: object) -> dict[str, int] | None:
    if isinstance(read, dict):
        fits = all(type(number) is int for number in read.values())
        return {str(name): number for name, number in read.items()} if fits else None
    if not isinstance(read, list) or not all(isinstance(name, str) for name in read):
        return None
    names = [name.strip() for name in read]
    while names and not names[-1]:
        names.pop()
    return {name: number for number, name in enumerate(names)} if len(set(names)) == len(names) else None


def check_covers(numbers: dict[str, int], classes: Sequence[str], file: str) -> None:
    """Raises DataError for a class of the data that a class map does not know."""
    if missing := [name for name in classes if name not in numbers]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"the class {missing[0]!r}{more} of the images is not in the class map {file}{nearest(missing[0], numbers)}"
        )


def warn_of_order(classes: Sequence[str], known: Sequence[str], where: str) -> None:
    """Warns when weights that name their classes (`known`), or whose classes were counted by torchvision, may number
    them otherwise than the data does."""
    if known and sorted(known) == sorted(classes) and list(known) != list(classes):
        _logger.warning(
            "%s has the classes in the order %s, the images in the order %s: give its order by --class-map FILE",
            where, _some(known), _some(classes),
        )  # fmt: skip
    elif not known and list(classes) != sorted(classes):
        _logger.warning(
            "the classes are numbered in timm's order, %s: if %s counts them as torchvision's ImageFolder does, %s, "
            "its answers are taken for other classes; give its order by --class-map FILE, one class per line",
            _some(classes), where, _some(sorted(classes)),
        )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
