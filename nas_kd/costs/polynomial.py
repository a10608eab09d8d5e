"""Integer polynomials, the one algebra of costs.

A cost is a sum of products of whole numbers: the channels that a block keeps, the taps of its kernel, whether it is
kept at all. `Polynomial` holds these products. It is evaluated at whatever adds and multiplies (integers, arrays,
tensors, other polynomials); where the choices of blocks set its variables, `ByChoices` writes it out for tables and
arrays of genotypes, and `channel_cost` for tensors.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.int64]
V = TypeVar("V", int, str)  # what names a variable


@dataclass(frozen=True, slots=True)
class Polynomial(Generic[V]):
    """A sum of products of variables. `terms` has a coefficient, never 0, for each sorted product.

    >>> inputs, outputs = Polynomial({("inputs",): 1}), Polynomial({("outputs",): 1})
    >>> (9 * inputs * outputs + inputs).terms
    {('inputs', 'outputs'): 9, ('inputs',): 1}
    >>> (9 * inputs * outputs + inputs).at({"inputs": 2, "outputs": 10})
    182
    """

    terms: Mapping[tuple[V, ...], int] = field(default_factory=dict)

    @staticmethod
    def sum(polynomials: Iterable[Polynomial[V]]) -> Polynomial[V]:
        """Add any number of polynomials."""
        return _collected(term for polynomial in polynomials for term in polynomial.terms.items())

    def __add__(self, other: Polynomial[V] | int) -> Polynomial[V]:
        added = other.terms if isinstance(other, Polynomial) else {(): other}
        return _collected(itertools.chain(self.terms.items(), added.items()))

    def __mul__(self, other: Polynomial[V] | int) -> Polynomial[V]:
        if not isinstance(other, Polynomial):
            return Polynomial({variables: other * a for variables, a in self.terms.items()} if other else {})
        return _collected(
            (tuple(sorted(one + two)), a * b) for one, a in self.terms.items() for two, b in other.terms.items()
        )

    __radd__ = __add__
    __rmul__ = __mul__

    def at(self, values: Mapping[V, Any]) -> Any:
        """Put these values in the place of the variables: integers, arrays, tensors or polynomials."""
        products = (
            functools.reduce(operator.mul, (values[variable] for variable in variables), coefficient)
            for variables, coefficient in self.terms.items()
        )
        return functools.reduce(operator.add, products, 0)

    def fixed(self, values: Mapping[V, int]) -> Polynomial[V]:
        """Put numbers in the place of some of the variables."""
        return _collected(
            (
                tuple(v for v in variables if v not in values),
                coefficient * math.prod(values[v] for v in variables if v in values),
            )
            for variables, coefficient in self.terms.items()
        )


def _collected(terms: Iterable[tuple[tuple[V, ...], int]]) -> Polynomial[V]:
    total: dict[tuple[V, ...], int] = {}
    for variables, coefficient in terms:
        total[variables] = total.get(variables, 0) + coefficient
    return Polynomial({variables: coefficient for variables, coefficient in total.items() if coefficient})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ByChoices:
    """A polynomial by the choices of blocks: a constant, plus numbers per choice of single blocks, plus products of
    such numbers of different blocks, each of which has a number that is not 0. Blocks are named by position."""

    constant: int
    single: Mapping[int, Vector]
    products: Sequence[Mapping[int, Vector]]

    def factors(self) -> Iterator[Mapping[int, Vector]]:
        """Yield every term but the constant, as a product of numbers per choice of single blocks."""
        yield from ({block: vector} for block, vector in self.single.items())
        yield from self.products

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks on whose choices the value depends, in order."""
        return tuple(sorted({block for factors in self.factors() for block in factors}))

    def bounds(self) -> tuple[int, int]:
        """Return what the value is at least and at most, given that no number in it is negative."""
        least = most = self.constant
        for factors in self.factors():
            least += math.prod(int(vector.min()) for vector in factors.values())
            most += math.prod(int(vector.max()) for vector in factors.values())
        return least, most

    def at(self, indices: Vector) -> Vector:
        """Return the value for each row of N × blocks positions of choices (N)."""
        total = np.full(len(indices), self.constant, dtype=np.int64)
        for factors in self.factors():
            columns = [vector[indices[:, block]] for block, vector in factors.items()]
            total += functools.reduce(np.multiply, columns)
        return total

    def table(self, blocks: Sequence[int], lengths: Sequence[int]) -> Vector:
        """Return the values at all choices of `blocks`, one dimension each; blocks have `lengths` choices."""
        table = np.full([lengths[block] for block in blocks], self.constant, dtype=np.int64)
        for factors in self.factors():
            shaped = (v.reshape([-1 if b == block else 1 for b in blocks]) for block, v in factors.items())
            table += functools.reduce(np.multiply, shaped)
        return table

    def pairs(self) -> dict[tuple[int, int], Vector]:
        """Return the sum of the products of each pair of blocks as a matrix over their choices."""
        matrices: dict[tuple[int, int], Vector] = {}
        for factors in self.products:
            (one, vector), (two, other) = sorted(factors.items())
            matrix = np.multiply.outer(vector, other)
            matrices[one, two] = matrices[one, two] + matrix if (one, two) in matrices else matrix
        return matrices


class Variables:
    """The variables of polynomials whose values the choices of blocks set: each has a number per choice of one block.

    `owners` has the block of each variable, `values` its numbers.
    """

    def __init__(self) -> None:
        self.owners: list[int] = []
        self.values: list[Vector] = []
        self._known: dict[tuple[int, tuple[int, ...]], Polynomial[int]] = {}
        self._factors: dict[tuple[int, ...], Mapping[int, Vector]] = {}

    def add(self, block: int, values: Iterable[int]) -> Polynomial[int]:
        """Add a variable with a value for each choice of `block`."""
        self.owners.append(block)
        self.values.append(np.fromiter(values, dtype=np.int64))
        return Polynomial({(len(self.owners) - 1,): 1})

    def of(self, block: int, values: Iterable[int]) -> Polynomial[int]:
        """Return the variable with these values; the same ones give the same variable."""
        key = block, tuple(values)
        if key not in self._known:
            self._known[key] = self.add(*key)
        return self._known[key]

    def chosen(
        self, block: int, options: Sequence[Polynomial[str]], values: Mapping[str, Polynomial[int]]
    ) -> Polynomial[int]:
        """Return the polynomial that takes one of `options`, by the choice of `block`, with `values` in the place of
        their variables."""
        parts = []
        for names in dict.fromkeys(names for option in options for names in option.terms):
            coefficients = [option.terms.get(names, 0) for option in options]
            differ = len(set(coefficients)) > 1
            factor = self.of(block, coefficients) if differ else Polynomial({(): coefficients[0]})
            parts.append(factor * Polynomial({names: 1}).at(values))
        return Polynomial.sum(parts)

    def by_choices(self, polynomial: Polynomial[int]) -> ByChoices:
        """Write a polynomial out by the choices of blocks."""
        constant, products = 0, []
        single: dict[int, Vector] = {}
        for variables, coefficient in polynomial.terms.items():
            factors = self._factors_of(variables)
            if not factors:
                constant += coefficient
            elif len(factors) == 1:
                ((block, vector),) = factors.items()
                scaled = vector * coefficient
                single[block] = single[block] + scaled if block in single else scaled
            elif all(vector.any() for vector in factors.values()):
                block, vector = next(iter(factors.items()))
                products.append({**factors, block: vector * coefficient})
        single = {block: vector for block, vector in single.items() if vector.any()}
        return ByChoices(constant=constant, single=single, products=products)

    def _factors_of(self, variables: tuple[int, ...]) -> Mapping[int, Vector]:
        """The numbers per choice of each block in a product."""
        if variables not in self._factors:
            factors: dict[int, Vector] = {}
            for variable in variables:
                block, vector = self.owners[variable], self.values[variable]
                factors[block] = factors[block] * vector if block in factors else vector
            self._factors[variables] = factors
        return self._factors[variables]
