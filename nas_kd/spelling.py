"""Budgets as people write them, in the one spelling that the rest of the package reads."""

from __future__ import annotations

import re
from decimal import Decimal

from nas_kd.errors import BudgetError

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:,|[^\d=]|$))")  # 1,000,000: what stands between bounds is never a number
_AMOUNT = re.compile(r"(\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(e[+-]?\d{1,2})?\s*(%|[a-zµμ]*)", re.IGNORECASE)
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_NOT_IN_BYTES = ("params", "macs", "latency")


def plain_budget(text: str) -> str:
    """A budget with its amounts in digits and K, M or G; what cannot be read is left for `parse_budget` to answer.

    Raises BudgetError for FLOPs, which are another unit.

    >>> plain_budget("Params=1e6, size=1.5MB, macs=30_000_000"), plain_budget("params=1,000,000,peak_memory=64KiB")
    ('params=1M,size=1500K,macs=30M', 'params=1M,peak_memory=65536')
    """
    parts = (part.partition("=") for part in _THOUSANDS.sub("", text).split(","))
    return ",".join(f"{_kind(kind)}{equals}{_amount(_kind(kind), amount.strip())}" for kind, equals, amount in parts)


def _kind(text: str) -> str:
    kind = text.strip().lower()
    if kind in ("flops", "flop", "gflops", "mflops"):
        raise BudgetError(
            f"a budget cannot bound {text.strip()!r}: use params or macs, multiply-accumulates for one image, as in "
            "macs=30M (papers count two FLOPs for each, or call them FLOPs)"
        )
    return kind


def _amount(kind: str, text: str) -> str:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        return text
    digits, power, unit = match[1], match[2] or "", match[3]
    if unit.lower() in _BYTES and kind not in _NOT_IN_BYTES:
        return _written(Decimal(digits + power) * _BYTES[unit.lower()])
    if "_" not in digits and not power:
        return f"{digits}{unit}"
    number = Decimal(digits + power)
    return f"{number:f}{unit}" if unit else _written(number)


def _written(number: Decimal) -> str:
    """Exactly this number, with the largest of K, M and G that leaves it whole."""
    for suffix, size in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size and number % size == 0:
            return f"{(number / size).normalize():f}{suffix}"
    return f"{number.normalize():f}"
