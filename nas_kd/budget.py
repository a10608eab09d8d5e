"""Costs of a network and hard upper bounds on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nas_kd.errors import BudgetError, nearest

KINDS = ("params", "macs")  # what a budget can bound, in the order of every table
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:(%)|([KMG]?))", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a network costs: `params`, learnable scalars; `macs`, multiply-accumulates of convolutions and linear
    layers for one image."""

    params: int
    macs: int

    def __getitem__(self, kind: str) -> int:
        if kind not in KINDS:
            raise KeyError(kind)
        value: int = getattr(self, kind)
        return value


@dataclass(frozen=True, slots=True)
class Budget(Mapping[str, float]):
    """Hard upper bounds: a mapping from a kind of cost to its bound, in the cost's unit.

    Made by `parse_budget`, which resolves fractions of the base. Raises BudgetError for an unknown kind or a bound
    that is not positive.
    """

    bounds: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        for kind, bound in self.bounds:
            if kind not in KINDS:
                raise BudgetError(f"a budget cannot bound {kind!r}: use {' or '.join(KINDS)}{nearest(kind, KINDS)}")
            if not bound > 0:
                raise BudgetError(f"the bound on {kind} must be positive, got {bound!r}")
        if len({kind for kind, _ in self.bounds}) != len(self.bounds):
            raise BudgetError("a budget bounds the same cost twice: give each once")

    def __getitem__(self, kind: str) -> float:
        return dict(self.bounds)[kind]

    def __iter__(self) -> Iterator[str]:
        return (kind for kind, _ in self.bounds)

    def __len__(self) -> int:
        return len(self.bounds)

    def __str__(self) -> str:
        return ",".join(f"{kind}={short(bound)}" for kind, bound in self.bounds)

    def excess(self, cost: Cost) -> dict[str, float]:
        """For each bound, how far `cost` is over it as a fraction; ≤ 0 is within."""
        return {kind: cost[kind] / bound - 1 for kind, bound in self.bounds}

    def admits(self, cost: Cost) -> bool:
        """Whether `cost` is within every bound."""
        return all(cost[kind] <= bound for kind, bound in self.bounds)

    def explain(self, cost: Cost) -> str:
        """In plain words, which bounds `cost` breaks and by how much; empty when it is within."""
        broken = [
            f"{kind} {short(cost[kind])} is {excess:.0%} over {short(self[kind])}"
            for kind, excess in self.excess(cost).items()
            if excess > 0
        ]
        return "over budget: " + "; ".join(broken) if broken else ""


def parse_budget(text: str, base: Cost | None = None) -> Budget:
    """Reads `params=1M,macs=30%`: amounts with K, M or G, or a percentage of the `base` cost.

    Without `base`, percentages are checked but resolve as if the base cost 100 of each: enough to refuse bad input
    before a model is built. Raises BudgetError and says how to write it.

    >>> parse_budget("params=1.5M,macs=30%", Cost(params=11, macs=1000)).bounds
    (('params', 1500000.0), ('macs', 300.0))
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise BudgetError("the budget is empty: write it like params=1M or params=1M,macs=30%")
    return Budget(tuple(_bound(part, base or Cost(params=100, macs=100)) for part in parts))


def _bound(part: str, base: Cost) -> tuple[str, float]:
    kind, equals, amount = (piece.strip() for piece in part.partition("="))
    match = _AMOUNT.fullmatch(amount)
    if kind not in KINDS:
        raise BudgetError(f"a budget cannot bound {kind!r}: use {' or '.join(KINDS)}{nearest(kind, KINDS)}")
    if not equals or match is None:
        raise BudgetError(f"cannot read the budget {part!r}: write it like {kind}=1M, {kind}=250K or {kind}=30%")
    number, percent, suffix = match.groups()
    value = float(number)
    if percent:
        return kind, value / 100 * base[kind]
    return kind, value * _SUFFIX[suffix.upper()]


def short(amount: float) -> str:
    """An amount as a person writes it.

    >>> short(1_000_000), short(980_123), short(42)
    ('1M', '980.1K', '42')
    """
    for suffix in ("G", "M", "K"):
        if amount >= _SUFFIX[suffix]:
            return f"{amount / _SUFFIX[suffix]:.4g}{suffix}"
    return f"{amount:.4g}"
