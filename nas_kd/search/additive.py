"""A Bayesian additive model of the score: what each choice of each block is worth, and how sure that is.

The score is a constant plus one term per block, and each term has parts for the width, the kernel, the kind and the
choice as a whole, all normal a priori around a prior mean; parts of the same kind and value also share a part over all
blocks, so that a first hundred trials say something of choices that were never tried. Scale and noise are those of the
largest marginal likelihood (Bishop 2006, section 3.5).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas_kd.genotype import Choice
from nas_kd.models.structure import Block

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
_ROUNDING = 1e-13  # of the largest eigenvalue, per row or column: what is smaller is 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """For each block a choices × parts matrix of 0 and 1; `variances` of the parts for a term of variance 1."""

    matrices: tuple[Array, ...]
    variances: Array

    def of(self, indices: NDArray[np.int64]) -> Array:
        """The parts (N × P) of N genotypes, given as N × blocks positions of choices."""
        return sum((matrix[column] for matrix, column in zip(self.matrices, indices.T, strict=True)), np.zeros(1))


def features_of(blocks: Sequence[Block]) -> Features:
    """The parts of the terms of these blocks."""
    parts: dict[object, int] = {}
    variances: list[float] = []

    def part(name: object, variance: float) -> int:
        if name not in parts:
            parts[name] = len(parts)
            variances.append(variance)
        return parts[name]

    members = []
    for block in blocks:
        rows = []
        for choice in block.choices:
            row = []
            for share, factor in zip(_SHARES, _FACTORS, strict=True):
                value = factor(choice)
                row += [part((block.name, value), share * (1 - _COMMON)), part(("all", value), share * _COMMON)]
            rows.append(row)
        members.append(rows)
    matrices = tuple(_one_hot(rows, len(parts)) for rows in members)
    return Features(matrices=matrices, variances=np.array(variances))


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
class AdditiveModel:
    """The posterior after N scored genotypes. `draw` gives one sample of what each choice of each block is worth."""

    features: Features
    prior: tuple[Array, ...]  # per block and choice
    observed: Array  # parts of the scored genotypes, N × P
    residuals: Array  # their scores without constant and prior mean, N
    spectrum: _Spectrum
    scale: float
    noise: float

    def draw(self, generator: np.random.Generator, boldness: float = 1.0) -> list[Array]:
        """One sample of what each choice is worth, per block an array over its choices.

        `boldness` 1 is a draw from the posterior, 0 its mean, between them a draw pulled towards the mean: with
        hundreds of choices the best of a full draw is mostly the luckiest.
        """
        deviations = self.scale * np.sqrt(self.features.variances)
        sample = generator.normal(size=len(deviations)) * deviations * boldness
        noise = generator.normal(size=len(self.observed)) * self.noise * boldness
        if len(self.observed):  # Matheron's rule: a prior sample, moved by what the trials say
            gap = self.residuals - self.observed @ sample - noise
            sample = sample + deviations**2 * (self.observed.T @ self.spectrum.over(gap, self.scale, self.noise))
        return [mean + matrix @ sample for mean, matrix in zip(self.prior, self.features.matrices, strict=True)]


def fit(features: Features, indices: NDArray[np.int64], scores: Array, damages: Sequence[Array]) -> AdditiveModel:
    """The model after genotypes (N × blocks positions) with these scores (N).

    `damages`, per block over its choices, give the prior mean up to a factor, which is fitted as well.
    """
    observed = features.of(indices) if len(indices) else np.zeros((0, len(features.variances)))
    expected = _total(damages, indices)
    slope = _slope(expected, scores)
    gaps = scores + slope * expected
    residuals = gaps - gaps.mean() if len(gaps) else gaps
    spectrum = _spectrum(observed * np.sqrt(features.variances))
    scale, noise = max(
        itertools.product(_SCALES, _NOISES), key=lambda pair: spectrum.evidence(residuals, *pair) if len(gaps) else 0.0
    )
    return AdditiveModel(
        features=features,
        prior=tuple(-slope * damage for damage in damages),
        observed=observed,
        residuals=residuals,
        spectrum=spectrum,
        scale=scale,
        noise=noise,
    )


def _total(damages: Sequence[Array], indices: NDArray[np.int64]) -> Array:
    if not len(indices):
        return np.zeros(0)
    total: Array = np.sum([damage[column] for damage, column in zip(damages, indices.T, strict=True)], axis=0)
    return total


def _slope(expected: Array, scores: Array) -> float:
    """How much score one unit of damage costs: least squares, pulled towards 0.05 by one imagined pair of trials."""
    if len(scores) < 2:
        return 0.05
    centred, gaps = expected - expected.mean(), scores - scores.mean()
    return max(0.0, float((0.05 - centred @ gaps) / (1 + centred @ centred)))
