from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas_kd.budget import KINDS, Budget, Cost, amount, parse_budget, parse_levels, short
from nas_kd.errors import BudgetError

AMOUNTS = st.floats(1e-3, 1e12)
BUDGETS = st.dictionaries(st.sampled_from(KINDS), AMOUNTS, min_size=1).map(lambda bounds: Budget(tuple(bounds.items())))
COSTS = st.builds(Cost, params=st.integers(0, 10**12), macs=st.integers(0, 10**15))


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("params=1M", {"params": 1e6}),
        ("params=1m", {"params": 1e6}),
        ("macs=250K,params=1.5G", {"macs": 250e3, "params": 1.5e9}),
        (" params = 42 , ", {"params": 42}),
        ("params=.5M", {"params": 500e3}),
        ("params=1.M", {"params": 1e6}),
        ("macs=30%", {"macs": 300}),
        ("macs=12.5%,params=100%", {"macs": 125, "params": 11}),
        ("latency=4ms", {"latency": 4e6}),
        ("latency=0.5 s,params=42", {"latency": 5e8, "params": 42}),
        ("latency=350us", {"latency": 350e3}),
        ("latency=350µs", {"latency": 350e3}),
        ("latency=50%", {"latency": 1e6}),
    ],
)
def test_parsing(text: str, bounds: dict[str, float]) -> None:
    assert dict(parse_budget(text, Cost(params=11, macs=1000, latency=2 * 10**6))) == bounds


@given(kind=st.sampled_from(KINDS), number=st.integers(1, 10**6), suffix=st.sampled_from("KMG"))
def test_suffixes_multiply(kind: str, number: int, suffix: str) -> None:
    assert parse_budget(f"{kind}={number}{suffix}")[kind] == number * {"K": 10**3, "M": 10**6, "G": 10**9}[suffix]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the budget is empty: write it like params=1M"),
        (" , ", "the budget is empty"),
        ("param=1M", "cannot bound 'param': use params or macs; did you mean 'params'"),
        ("flops=1M", "cannot bound 'flops': use params or macs"),
        ("params", "cannot read the budget 'params': write it like params=1M, params=250K or params=30%"),
        ("params=", "cannot read the budget"),
        ("params=many", "cannot read the budget"),
        ("params=-1M", "cannot read the budget"),
        ("params=1T", "cannot read the budget"),
        ("params=1M%", "cannot read the budget"),
        ("params=0", r"the bound on params must be positive, got 0\.0"),
        ("params=0%", "the bound on params must be positive"),
        ("latency=4", "cannot read the budget 'latency=4': write it like latency=4ms, 500us or latency=30%"),
        ("latency=4M", "cannot read the budget"),
        ("params=4ms", "cannot read the budget"),
        ("latency=0ms", "the bound on latency must be positive"),
        ("params=1M,params=2M", "bounds the same cost twice: give each once"),
    ],
)
def test_bad_budgets(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_budget(text)


def test_a_bound_is_a_number() -> None:
    with pytest.raises(BudgetError, match="must be positive, got nan"):
        Budget((("params", math.nan),))


@given(text=st.text(max_size=20))
def test_any_text_gives_one_kind_of_error(text: str) -> None:
    try:
        parse_budget(text)
    except BudgetError:
        return
    assert "=" in text


@given(budget=BUDGETS, cost=COSTS)
def test_admits_excess_and_explain_agree(budget: Budget, cost: Cost) -> None:
    within = all(excess <= 0 for excess in budget.excess(cost).values())
    assert budget.admits(cost) == within == (budget.explain(cost) == "")


@given(budget=BUDGETS)
def test_the_bound_itself_is_within(budget: Budget) -> None:
    cost = Cost(**{kind: math.floor(budget.get(kind, 0)) for kind in KINDS})
    assert budget.admits(cost)


@given(budget=BUDGETS)
def test_printed_budgets_can_be_read(budget: Budget) -> None:
    if all(0.01 < bound < 1e12 for bound in budget.values()):
        again = parse_budget(str(budget))
        assert all(math.isclose(again[kind], bound, rel_tol=1e-3) for kind, bound in budget.items())


def test_explanation() -> None:
    budget = parse_budget("params=1M,macs=2G")
    assert budget.explain(Cost(params=1_500_000, macs=1)) == "over budget: params 1.5M is 50% over 1M"


def test_costs_are_read_by_kind() -> None:
    assert Cost(params=3, macs=4)["macs"] == 4
    with pytest.raises(KeyError):
        Cost(params=3, macs=4)["__class__"]


@pytest.mark.parametrize(
    ("amount", "text"), [(0.5, "0.5"), (999, "999"), (1000, "1K"), (2_236_682, "2.237M"), (3e9, "3G")]
)
def test_short(amount: float, text: str) -> None:
    assert short(amount) == text


def test_times_are_printed_with_their_unit() -> None:
    budget = parse_budget("latency=4.5ms,params=1M")
    assert str(budget) == "latency=4.5ms,params=1M"
    over = budget.explain(Cost(params=10**6, macs=1, latency=5_400_000))
    assert over == "over budget: latency 5.4ms is 20% over 4.5ms"
    assert amount("latency", 350) == "350ns"
    assert amount("latency", 2.5e9) == "2.5s"


def test_a_latency_that_was_not_measured_is_not_within() -> None:
    assert not parse_budget("latency=4ms").admits(Cost(params=1, macs=1))
    assert parse_budget("latency=4ms").admits(Cost(params=1, macs=1, latency=1))


@pytest.mark.parametrize(("text", "levels"), [("1", (1.0,)), ("0.5", (0.5, 1.0)), ("50%, .25,1", (0.25, 0.5, 1.0))])
def test_levels(text: str, levels: tuple[float, ...]) -> None:
    assert parse_levels(text) == levels


@pytest.mark.parametrize("text", ["", "half", "0", "1.5", "-1", "nan", "0.5,,1"])
def test_bad_levels(text: str) -> None:
    with pytest.raises(BudgetError, match="level"):
        parse_levels(text)
