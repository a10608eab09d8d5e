"""A Bayesian additive model of the score: what each choice of each block is worth, and how sure that is.

The score is a constant, one term per block, and an allowance for size, so much for each doubling of params and of MACs:
damages are measured one block at a time, and a small student has less to make up for them. Each term has parts for the
width, the kernel, the kind and the choice as a whole, all normal a priori around a prior mean; parts of the same kind
and value also share a part over all blocks, so that a first hundred trials say something of choices that were never
tried. What one unit of damage costs is a part like any other. Scale and noise are those of the largest marginal
likelihood (Bishop 2006, section 3.5).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nas_kd.budget import KINDS
from nas_kd.costs.cost_table import CostTable
from nas_kd.genotype import Choice

Array = NDArray[np.float64]
_SCALES = (0.003, 0.01, 0.03, 0.1, 0.3)  # standard deviations of one block's term, in units of the score (0–1)
_NOISES = (0.001, 0.003, 0.01, 0.03)
_FACTORS: Sequence[Callable[[Choice], object]] = (
    # a dropped block has the width, kernel and kind of the base in name only
    lambda choice: ("width", choice.width, choice.keep),
    lambda choice: ("kernel", choice.kernel_size, choice.keep),
    lambda choice: ("conv", choice.conv, choice.keep),
    lambda choice: choice,
)
_SHARES = (0.35, 0.1, 0.35, 0.2)  # of a term's variance, in the order of _FACTORS
_COMMON = 0.5  # of a factor's variance that all blocks share
_SLOPE = 0.05  # score that one unit of damage costs, before any trial
_SLOPE_VARIANCE = 25.0  # of it, and of the score per doubling of a cost, where a term has variance 1
_SIZE_VARIANCE = 5.0
_ROUNDING = 1e-13  # of the largest eigenvalue, per row or column: what is smaller is 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChoiceFeatures:
    """For each block a choices × parts matrix, and `prior`, the mean of its term by choice; `variances` of the parts,
    and after them of the allowances for size, where a term has variance 1."""

    table: CostTable
    matrices: tuple[Array, ...]
    prior: tuple[Array, ...]
    variances: Array

    def of(self, indices: NDArray[np.int64]) -> Array:
        """What N genotypes, given as N × blocks positions of choices, have of each part and size (N × P)."""
        parts = np.zeros((len(indices), self.matrices[0].shape[1]))
        for matrix, column in zip(self.matrices, indices.T, strict=True):
            parts += matrix[column]
        return np.concatenate([parts, self.sizes(indices)], axis=1)

    def sizes(self, indices: NDArray[np.int64]) -> Array:
        """How often their params and MACs double (N × kinds), from one on."""
        totals = self.table.many(indices, KINDS)
        return np.stack([np.log2(np.maximum(totals[kind], 1)) for kind in KINDS], axis=1)


def features_of(table: CostTable, damages: Sequence[Array]) -> ChoiceFeatures:
    """The parts of the terms of a table's blocks; `damages`, per block over its choices, give the prior mean up to a
    factor, which is a part as well."""
    parts: dict[object, int] = {}
    variances: list[float] = []

    def part(name: object, variance: float) -> int:
        if name not in parts:
            parts[name] = len(parts)
            variances.append(variance)
        return parts[name]

    members = []
    for block in table.blocks:
        rows = []
        for choice in block.choices:
            row = []
            for share, factor in zip(_SHARES, _FACTORS, strict=True):
                value = factor(choice)
                row += [part((block.name, value), share * (1 - _COMMON)), part(("all", value), share * _COMMON)]
            rows.append(row)
        members.append(rows)
    ones = [_one_hot(rows, len(parts)) for rows in members]
    slopes = [np.append(matrix, -damage[:, None], axis=1) for matrix, damage in zip(ones, damages, strict=True)]
    return ChoiceFeatures(
        table=table,
        matrices=tuple(slopes),
        prior=tuple(-_SLOPE * damage for damage in damages),
        variances=np.array([*variances, _SLOPE_VARIANCE, *(_SIZE_VARIANCE for _ in KINDS)]),
    )


def _one_hot(rows: Sequence[Sequence[int]], width: int) -> Array:
    matrix = np.zeros((len(rows), width))
    for index, row in enumerate(rows):
        matrix[index, row] = 1.0
    return matrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Spectrum:
    """The covariance of N scores for a scale of 1 and no noise, as its R eigenvalues that are not 0 and their vectors
    (N × R): with it every scale and noise are cheap."""

    values: Array
    vectors: Array

    def over(self, gaps: Array, scale: float, noise: float) -> Array:
        """The covariance's inverse, of this scale and noise, times N numbers."""
        shares = 1 / (scale**2 * self.values + noise**2) - 1 / noise**2
        product: Array = gaps / noise**2 + self.vectors @ (shares * (self.vectors.T @ gaps))
        return product

    def evidence(self, residuals: Array, scale: float, noise: float) -> float:
        """The log likelihood of the residuals, up to a constant and a factor."""
        own = np.log(scale**2 * self.values + noise**2).sum()
        rest = (len(residuals) - len(self.values)) * np.log(noise**2)
        return float(-residuals @ self.over(residuals, scale, noise) - own - rest)


def _spectrum(weighted: Array) -> _Spectrum:
    """Of N × P parts, each times its standard deviation: from the smaller of the two matrices of products."""
    tall = len(weighted) > weighted.shape[1]
    values, vectors = np.linalg.eigh(weighted.T @ weighted if tall else weighted @ weighted.T)
    kept = values > _ROUNDING * max(1, *weighted.shape) * values.max(initial=0.0)
    values, vectors = values[kept], vectors[:, kept]
    return _Spectrum(values=values, vectors=weighted @ vectors / np.sqrt(values) if tall else vectors)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Belief:
    """One guess at the score: what each choice is `worth`, per block an array over its choices, and what each doubling
    of a cost is (`size`)."""

    features: ChoiceFeatures
    worth: tuple[Array, ...]
    size: Array
    constant: float = 0.0

    def scores(self, indices: NDArray[np.int64]) -> Array:
        """The scores of N genotypes (N × blocks positions)."""
        totals: Array = self.constant + self.features.sizes(indices) @ self.size
        return totals + total(self.worth, indices)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdditiveModel:
    """The posterior after N scored genotypes. `draw` gives one sample of the score."""

    features: ChoiceFeatures
    indices: NDArray[np.int64]  # the scored genotypes, N × blocks
    centred: Array  # what they have of each part, around their mean, N × P
    scores: Array  # N
    residuals: Array  # without mean and prior mean, N
    spectrum: _Spectrum
    scale: float
    noise: float

    def draw(self, generator: np.random.Generator, boldness: float = 1.0) -> Belief:
        """One sample of the score.

        `boldness` 1 is a draw from the posterior, 0 its mean, between them a draw pulled towards the mean: with
        hundreds of choices the best of a full draw is mostly the luckiest.
        """
        deviations = self.scale * np.sqrt(self.features.variances)
        sample = generator.normal(size=len(deviations)) * deviations * boldness
        noise = generator.normal(size=len(self.scores)) * self.noise * boldness
        if len(self.scores):  # Matheron's rule: a prior sample, moved by what the trials say
            gap = self.residuals - self.centred @ sample - noise
            sample = sample + deviations**2 * (self.centred.T @ self.spectrum.over(gap, self.scale, self.noise))
        return self._belief(sample)

    def _belief(self, sample: Array) -> Belief:
        """What these weights of the parts say; where there are scores their mean is theirs."""
        parts, size = np.split(sample, [-len(KINDS)])
        pairs = zip(self.features.prior, self.features.matrices, strict=True)
        worth = tuple(mean + matrix @ parts for mean, matrix in pairs)
        belief = Belief(features=self.features, worth=worth, size=size)
        if not len(self.scores):
            return belief
        return replace(belief, constant=float(self.scores.mean() - belief.scores(self.indices).mean()))


def fit_scores(features: ChoiceFeatures, indices: NDArray[np.int64], scores: Array) -> AdditiveModel:
    """The model after genotypes (N × blocks positions) with these scores (N)."""
    gaps = scores - total(features.prior, indices)
    residuals, centred = gaps, features.of(indices)
    if len(scores):
        residuals, centred = gaps - gaps.mean(), centred - centred.mean(axis=0)
    spectrum = _spectrum(centred * np.sqrt(features.variances))
    scale, noise = max(
        itertools.product(_SCALES, _NOISES), key=lambda pair: spectrum.evidence(residuals, *pair) if len(gaps) else 0.0
    )
    return AdditiveModel(
        features=features,
        indices=indices,
        centred=centred,
        scores=scores,
        residuals=residuals,
        spectrum=spectrum,
        scale=scale,
        noise=noise,
    )


def total(terms: Sequence[Array], indices: NDArray[np.int64]) -> Array:
    """The sums of terms, per block over its choices, of N genotypes (N × blocks positions)."""
    sums = np.zeros(len(indices))
    for term, column in zip(terms, indices.T, strict=True):
        sums += term[column]
    return sums
