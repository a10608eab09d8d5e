"""Settings in parts: frozen values that commands share, read from the flat mapping of parsed arguments and written as
one again. A field's default is stated in its class and nowhere else: parsers take it from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Value = TypeVar("Value", bound="DataclassInstance")
_ARGUMENT, _PART = "argument", "part"


def argument(name: str, default: Any = MISSING) -> Any:
    """A field whose argument has another name, since the part that it is in says the rest: `teacher_epochs` is
    `teacher.epochs`."""
    return field(default=default, metadata={_ARGUMENT: name})


def part(kind: type[DataclassInstance]) -> Any:
    """A field that is a part itself, with arguments of its own."""
    return field(metadata={_PART: kind})


def read(kind: type[Value], arguments: Mapping[str, Any]) -> Value:
    """The value of a class of settings; what the mapping has not is as by default, what it has more is left out. Raises
    TypeError where something has no default."""
    values: dict[str, Any] = {}
    for own in fields(kind):
        if _PART in own.metadata:
            values[own.name] = read(own.metadata[_PART], arguments)
        elif _name(own) in arguments:
            values[own.name] = arguments[_name(own)]
    return kind(**values)


def written(settings: DataclassInstance) -> dict[str, Any]:
    """Settings by the names of their arguments; the inverse of `read`."""
    found: dict[str, Any] = {}
    for own in fields(settings):
        value = getattr(settings, own.name)
        found |= written(value) if _PART in own.metadata else {_name(own): value}
    return found


def changed(settings: Value, **arguments: Any) -> Value:
    """The same settings but for these, which are named like arguments. Raises TypeError for one that there is not."""
    known = written(settings)
    if unknown := arguments.keys() - known.keys():
        raise TypeError(f"{type(settings).__name__} has no {sorted(unknown)[0]}")
    return read(type(settings), {**known, **arguments})


def defaults(kind: type[DataclassInstance]) -> dict[str, Any]:
    """What arguments are by default, where that is a value."""
    return {_name(own): own.default for own in _leaves(kind) if own.default is not MISSING}


def _leaves(kind: type[DataclassInstance]) -> Iterator[Field[Any]]:
    for own in fields(kind):
        if _PART in own.metadata:
            yield from _leaves(own.metadata[_PART])
        else:
            yield own


def _name(own: Field[Any]) -> str:
    return str(own.metadata.get(_ARGUMENT, own.name))
