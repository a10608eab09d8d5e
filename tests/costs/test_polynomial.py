"""The laws of the polynomials behind the costs, and that a table, an array and a tensor of one hold the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nas_kd.costs.polynomial import Polynomial, Variables

N_VARIABLES = 5
PRODUCTS = st.lists(st.integers(0, N_VARIABLES - 1), max_size=3).map(lambda product: tuple(sorted(product)))
POLYNOMIALS = st.dictionaries(PRODUCTS, st.integers(1, 1000) | st.integers(-1000, -1), max_size=6).map(Polynomial)
VALUES = st.fixed_dictionaries({variable: st.integers(-50, 50) for variable in range(N_VARIABLES)})


@given(one=POLYNOMIALS, two=POLYNOMIALS, values=VALUES, factor=st.integers(-9, 9))
def test_sums_and_products_are_those_of_the_values(
    one: Polynomial[int], two: Polynomial[int], values: dict[int, int], factor: int
) -> None:
    assert (one + two).at(values) == one.at(values) + two.at(values)
    assert (one * two).at(values) == one.at(values) * two.at(values)
    assert (factor * one + factor).at(values) == factor * one.at(values) + factor
    assert Polynomial.sum([one, two, one]).at(values) == 2 * one.at(values) + two.at(values)


@given(one=POLYNOMIALS, two=POLYNOMIALS, three=POLYNOMIALS)
def test_equal_polynomials_are_written_alike(
    one: Polynomial[int], two: Polynomial[int], three: Polynomial[int]
) -> None:
    assert one + two == two + one
    assert one * two == two * one
    assert (one * two) * three == one * (two * three)
    assert one * (two + three) == one * two + one * three
    assert one + -1 * one == 0 * one == Polynomial()


@given(outer=POLYNOMIALS, inner=st.lists(POLYNOMIALS, min_size=N_VARIABLES, max_size=N_VARIABLES), values=VALUES)
def test_polynomials_can_be_put_in_the_place_of_variables(
    outer: Polynomial[int], inner: list[Polynomial[int]], values: dict[int, int]
) -> None:
    composed = outer.at(dict(enumerate(inner))) + Polynomial()  # a constant is composed to an integer
    assert composed.at(values) == outer.at({variable: one.at(values) for variable, one in enumerate(inner)})


@given(polynomial=POLYNOMIALS, values=VALUES, first=st.integers(0, N_VARIABLES))
def test_fixing_some_variables_and_then_the_others_is_fixing_all(
    polynomial: Polynomial[int], values: dict[int, int], first: int
) -> None:
    some = {variable: value for variable, value in values.items() if variable < first}
    rest = polynomial.fixed(some)
    assert not {variable for variables in rest.terms for variable in variables} & some.keys()
    assert rest.at(values) == polynomial.at(values)


@st.composite
def chosen_variables(draw: st.DrawFn) -> tuple[Variables, list[int]]:
    """Variables of three blocks, and how many choices each block has."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=3, max_size=3))
    variables = Variables()
    for _ in range(N_VARIABLES):
        block = draw(st.integers(0, 2))
        variables.add(block, draw(st.lists(st.integers(0, 50), min_size=lengths[block], max_size=lengths[block])))
    return variables, lengths


@given(polynomial=POLYNOMIALS, drawn=chosen_variables())
def test_integers_arrays_tables_and_tensors_are_the_same(
    polynomial: Polynomial[int], drawn: tuple[Variables, list[int]]
) -> None:
    variables, lengths = drawn
    written = variables.by_choices(polynomial)
    rows = np.array(list(itertools.product(*map(range, lengths))))
    columns = [values[rows[:, block]] for block, values in zip(variables.owners, variables.values, strict=True)]
    expected = [polynomial.at({v: int(column[row]) for v, column in enumerate(columns)}) for row in range(len(rows))]
    array, table = written.at(rows), written.table((0, 1, 2), lengths)
    assert array.dtype == table.dtype == np.int64
    assert array.tolist() == table.ravel().tolist() == expected
    own = written.table(written.blocks, lengths)
    assert np.broadcast_to(own[tuple(rows[:, block] for block in written.blocks)], len(rows)).tolist() == expected
    tensors = {v: torch.from_numpy(column) for v, column in enumerate(columns)}
    assert (polynomial.at(tensors) + torch.zeros(len(rows), dtype=torch.int64)).tolist() == expected


@given(polynomial=POLYNOMIALS, drawn=chosen_variables())
def test_pairs_are_the_products_of_two_blocks(polynomial: Polynomial[int], drawn: tuple[Variables, list[int]]) -> None:
    variables, lengths = drawn
    at_most_two = Polynomial({product: n for product, n in polynomial.terms.items() if len(product) <= 2})
    written = variables.by_choices(at_most_two)
    total = np.full(lengths, written.constant)
    for block, vector in written.single.items():
        total += vector.reshape([-1 if other == block else 1 for other in range(3)])
    for pair, matrix in written.pairs().items():
        assert pair[0] < pair[1]
        total += matrix.reshape([lengths[other] if other in pair else 1 for other in range(3)])
    assert (total == written.table((0, 1, 2), lengths)).all()


@given(polynomial=POLYNOMIALS, drawn=chosen_variables())
def test_nothing_is_beyond_the_bounds(polynomial: Polynomial[int], drawn: tuple[Variables, list[int]]) -> None:
    variables, lengths = drawn
    written = variables.by_choices(Polynomial({product: abs(n) for product, n in polynomial.terms.items()}))
    table = written.table((0, 1, 2), lengths)
    least, most = written.bounds()
    assert least <= table.min()
    assert most >= table.max()
    if not written.products:
        assert (least, most) == (table.min(), table.max())


def test_a_choice_takes_one_of_the_options() -> None:
    variables = Variables()
    width = variables.add(0, [8, 4])
    options = [Polynomial({("inputs", "inputs"): 9, ("inputs",): 2}), Polynomial({}), Polynomial({("inputs",): 2})]
    chosen = variables.by_choices(variables.chosen(1, options, {"inputs": width}))
    table = [[9 * 64 + 16, 0, 16], [9 * 16 + 8, 0, 8]]
    assert chosen.table((0, 1), (2, 3)).tolist() == table


def test_what_all_options_share_does_not_depend_on_the_choice() -> None:
    variables = Variables()
    options = [Polynomial({("inputs",): 7}), Polynomial({("inputs",): 7})]
    assert variables.by_choices(variables.chosen(1, options, {"inputs": variables.add(0, [3, 1])})).blocks == (0,)


@pytest.mark.parametrize("exact", [2**53 + 1, 2**62 + 1])
def test_whole_numbers_beyond_a_float_are_exact(exact: int) -> None:
    variables = Variables()
    polynomial = exact * variables.add(0, [1, 0]) * variables.add(1, [0, 1]) + exact
    written = variables.by_choices(polynomial)
    rows = np.array([[0, 0], [0, 1]])
    assert written.constant == exact
    assert written.pairs()[0, 1].tolist() == [[0, exact], [0, 0]]
    assert (written.at(rows) - exact).tolist() == [0, exact]
