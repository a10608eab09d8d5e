"""Costs of a network and hard upper bounds on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nas_kd.errors import BudgetError, nearest
from nas_kd.spelling import plain_budget

KINDS = ("params", "macs")  # what students are compared by, in the order of every table
COUNTED = (*KINDS, "size", "peak_memory")  # exact, in closed form
DEVICE = ("flash", "ram")  # of the int8 form: in closed form, and measured before a result is exported
LATENCY, CYCLES = "latency", "cycles"
MEASURED = (CYCLES, LATENCY)  # on whole students, the quicker first
ON_DEVICE = (*DEVICE, CYCLES)
ACCELERATORS = (*(f"ethos-u55-{n}" for n in (32, 64, 128, 256)), *(f"ethos-u65-{n}" for n in (256, 512)))
ACCELERATOR = "ethos-u55-128"  # whose cycles are meant by default
BOUNDABLE = (*COUNTED, *ON_DEVICE, LATENCY)  # what a budget can bound
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_BYTES = _SUFFIX | {f"{letter}B": amount for letter, amount in _SUFFIX.items()}
_BYTES |= {f"{letter}IB": 2 ** (10 * power) for power, letter in enumerate("KMG", start=1)}
_NANOSECONDS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9}
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[KMG]i?B|[KMGB]|[nuµμm]?s)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a network costs. Costs are equal when params and macs are.

    Attributes:
        params: Learnable scalars.
        macs: Multiply-accumulates of convolutions and linear layers for one image.
        size: Bytes of the exported weights, float32.
        peak_memory: Bytes of the float32 activations that are alive at once for one image in a deployed graph (see
            `nas_kd.analysis.schedule`); 0 where they were not counted.
        flash: Bytes of the int8 file (see `nas_kd.costs.device`); 0 where they were not counted.
        ram: Bytes of the arena in which an interpreter on a device runs it; 0 where they were not counted.
        cycles: Those that a compiler estimates of the int8 form on an accelerator (see `nas_kd.costs.cycle_table`); 0
            where it did not.
        latency: Nanoseconds of one forward pass (see `nas_kd.costs.latency_table`); 0 where it was not measured.

    Example:
        >>> from nas_kd import Cost
        >>> cost = Cost(params=11_000_000, macs=1_800_000_000)
        >>> cost["macs"] == cost.macs
        True
    """

    params: int
    macs: int
    size: int = field(default=0, compare=False)
    peak_memory: int = field(default=0, compare=False)
    flash: int = field(default=0, compare=False)
    ram: int = field(default=0, compare=False)
    cycles: int = field(default=0, compare=False)
    latency: int = field(default=0, compare=False)

    def __getitem__(self, kind: str) -> int:
        if kind not in BOUNDABLE:
            raise KeyError(kind)
        value: int = getattr(self, kind)
        return value


@dataclass(frozen=True, slots=True)
class Budget(Mapping[str, float]):
    """Hard upper bounds: a mapping from a kind of cost to its bound. `parse_budget` makes one.

    Attributes:
        bounds: (kind, bound) pairs, in the units of `Cost`.
        fixed: Kinds that are bounded by what the base has, to rule out what is worse: smaller levels leave them alone.

    Raises:
        BudgetError: For an unknown kind, or a bound that is not positive.

    Example:
        >>> from nas_kd import Budget, Cost
        >>> budget = Budget((("params", 1_000_000.0),))
        >>> budget.admits(Cost(params=900_000, macs=0)), budget.explain(Cost(params=1_200_000, macs=0))
        (True, 'over budget: params 1.2M is 20% over 1M')
    """

    bounds: tuple[tuple[str, float], ...]
    fixed: tuple[str, ...] = ()

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
        return ",".join(f"{kind}={amount(kind, bound)}" for kind, bound in self.bounds)

    def excess(self, cost: Cost) -> dict[str, float]:
        """For each bound, how far `cost` is over it as a fraction; ≤ 0 is within."""
        return {kind: cost[kind] / bound - 1 for kind, bound in self.bounds}

    def admits(self, cost: Cost) -> bool:
        """Whether `cost` is within every bound; a cost that was not measured or counted is not."""
        needed = (LATENCY, *ON_DEVICE)
        return all(cost[kind] <= bound and (kind not in needed or cost[kind] > 0) for kind, bound in self.bounds)

    def scaled(self, share: float) -> Budget:
        """The same kinds, every bound that is not fixed at this share of what it is."""
        scaled = ((kind, bound if kind in self.fixed else bound * share) for kind, bound in self.bounds)
        return Budget(tuple(scaled), self.fixed)

    def with_bound(self, kind: str, bound: float) -> Budget:
        """With another bound on one kind."""
        return Budget(tuple((name, bound if name == kind else own) for name, own in self.bounds), self.fixed)

    def without(self, kind: str) -> Budget:
        """With no bound on one kind."""
        return Budget(tuple((name, own) for name, own in self.bounds if name != kind), self.fixed)

    def no_worse_than(self, base: Cost, kinds: Sequence[str]) -> Budget:
        """With bounds at what the base has on those of `kinds` that have none yet."""
        own = tuple(kind for kind in kinds if kind not in self)
        return Budget((*self.bounds, *((kind, float(base[kind])) for kind in own)), (*self.fixed, *own))

    def explain(self, cost: Cost) -> str:
        """In plain words, which bounds `cost` breaks and by how much; empty when it is within."""
        broken = [
            f"{kind} {amount(kind, cost[kind])} is {_percent(excess)} over {amount(kind, self[kind])}"
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
        raise BudgetError(
            f"a budget cannot bound {kind!r}: use params or macs{hint} (or size, peak_memory, in int8 flash and ram: "
            "in bytes; cycles of an accelerator; latency: in ms)"
        )


def parse_budget(text: str, base: Cost | None = None) -> Budget:
    """Reads a budget as people write it.

    Args:
        text: Bounds such as `params=1M,macs=30%,latency=4ms`: amounts with K, M or G (thousands, also of bytes, which
            may be written KB, or KiB for 1024), times with us, ms or s, or a percentage of the base.
        base: What the base costs. Without it percentages are checked, but resolve as if the base cost 100 of each:
            enough to refuse bad input before a model is built.

    Returns:
        The bounds, in the units of `Cost`.

    Raises:
        BudgetError: For what is no budget; it says how to write one.

    Example:
        >>> from nas_kd import Cost, parse_budget
        >>> parse_budget("params=1.5M,macs=30%", Cost(params=11, macs=1000)).bounds
        (('params', 1500000.0), ('macs', 300.0))
    """
    parts = [part.strip() for part in plain_budget(text).split(",") if part.strip()]
    if not parts:
        raise BudgetError("the budget is empty: write it like params=1M or params=1M,macs=30%")
    base = base or Cost(**dict.fromkeys(BOUNDABLE, 100))
    return Budget(tuple(_bound(part, base) for part in parts))


def _bound(part: str, base: Cost) -> tuple[str, float]:
    kind, equals, text = (piece.strip() for piece in part.partition("="))
    match = _AMOUNT.fullmatch(text)
    _check_kind(kind)
    units = _NANOSECONDS if kind == LATENCY else _SUFFIX if kind in (*KINDS, CYCLES) else _BYTES
    number, unit = match.groups(default="") if match else ("", "")
    unit = unit.lower() if kind == LATENCY else unit.upper()
    if not equals or match is None or (unit != "%" and unit not in units):
        like = "4ms, 500us" if kind == LATENCY else f"1M, {kind}=250K"
        raise BudgetError(f"cannot read the budget {part!r}: write it like {kind}={like} or {kind}=30%")
    return kind, float(number) / 100 * base[kind] if unit == "%" else float(number) * units[unit]


def _percent(excess: float) -> str:
    return f"{excess:.0%}" if excess >= 0.01 else f"{excess:.1%}" if excess >= 0.001 else "< 0.1%"


def amount(kind: str, value: float) -> str:
    """An amount of this kind of cost as a person writes it, and as `parse_budget` reads it.

    >>> amount("params", 980_123), amount("latency", 3_500_000), amount("latency", 72_340)
    ('980.1K', '3.5ms', '72.34us')
    """
    if kind != LATENCY:
        return short(value)
    unit = next((unit for unit in ("s", "ms", "us") if value >= _NANOSECONDS[unit]), "ns")
    return f"{value / _NANOSECONDS[unit]:.4g}{unit}"


def parse_levels(text: str) -> tuple[float, ...]:
    """Reads `0.25,0.5` or `25%,50%`: shares of a budget, from the smallest to the budget itself, which is always one.

    Raises BudgetError for anything else.

    >>> parse_levels("0.5,25%")
    (0.25, 0.5, 1.0)
    """
    levels = {1.0}
    for part in (part.strip() for part in text.split(",")):
        try:
            level = float(part[:-1]) / 100 if part.endswith("%") else float(part)
        except ValueError:
            raise BudgetError(f"cannot read the level {part!r}: write --levels like 0.25,0.5,1") from None
        if not 0 < level <= 1:
            raise BudgetError(f"the level {part} is no share of the budget: give numbers above 0 and up to 1")
        levels.add(level)
    return tuple(sorted(levels))


def short(amount: float) -> str:
    """An amount as a person writes it.

    >>> short(1_000_000), short(980_123), short(42)
    ('1M', '980.1K', '42')
    """
    for suffix in ("G", "M", "K"):
        if amount >= _SUFFIX[suffix]:
            return f"{amount / _SUFFIX[suffix]:.4g}{suffix}"
    return f"{amount:.4g}"
