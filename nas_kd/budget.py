"""Costs of a network and hard upper bounds on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nas_kd.errors import BudgetError, nearest

KINDS = ("params", "macs")  # what students are compared by, in the order of every table
BOUNDABLE = (*KINDS, "size", "peak_memory")  # what a budget can bound
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:(%)|([KMG]?))", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a network costs.

    `params`, learnable scalars; `macs`, multiply-accumulates of convolutions and linear layers for one image; `size`,
    bytes of the exported weights; `peak_memory`, bytes of the activations that are alive at once for one image (both
    at float32, see `nas_kd.models.memory`; 0 where they were not counted). Costs are equal when params and macs are.
    """

    params: int
    macs: int
    size: int = field(default=0, compare=False)
    peak_memory: int = field(default=0, compare=False)

    def __getitem__(self, kind: str) -> int:
        if kind not in BOUNDABLE:
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
            _check_kind(kind)
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

    def scaled(self, share: float) -> Budget:
        """The same kinds, every bound at this share of what it is."""
        return Budget(tuple((kind, bound * share) for kind, bound in self.bounds))

    def explain(self, cost: Cost) -> str:
        """In plain words, which bounds `cost` breaks and by how much; empty when it is within."""
        broken = [
            f"{kind} {short(cost[kind])} is {excess:.0%} over {short(self[kind])}"
            for kind, excess in self.excess(cost).items()
            if excess > 0
        ]
        return "over budget: " + "; ".join(broken) if broken else ""


def kinds_of(budget: Budget | None) -> tuple[str, ...]:
    """What students are compared by: params and macs, and whatever else the budget bounds."""
    return (*KINDS, *(kind for kind in budget or () if kind not in KINDS))


def _check_kind(kind: str) -> None:
    if kind not in BOUNDABLE:
        hint = nearest(kind, BOUNDABLE)
        raise BudgetError(f"a budget cannot bound {kind!r}: use params or macs{hint} (or size, peak_memory: in bytes)")


def parse_budget(text: str, base: Cost | None = None) -> Budget:
    """Reads `params=1M,macs=30%`: amounts with K, M or G (thousands, also of bytes), or a percentage of the `base`
    cost.

    Without `base`, percentages are checked but resolve as if the base cost 100 of each: enough to refuse bad input
    before a model is built. Raises BudgetError and says how to write it.

    >>> parse_budget("params=1.5M,macs=30%", Cost(params=11, macs=1000)).bounds
    (('params', 1500000.0), ('macs', 300.0))
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise BudgetError("the budget is empty: write it like params=1M or params=1M,macs=30%")
    return Budget(tuple(_bound(part, base or Cost(params=100, macs=100, size=100, peak_memory=100)) for part in parts))


def _bound(part: str, base: Cost) -> tuple[str, float]:
    kind, equals, amount = (piece.strip() for piece in part.partition("="))
    match = _AMOUNT.fullmatch(amount)
    _check_kind(kind)
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
