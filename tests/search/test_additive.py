"""The additive model's algebra beside the plain formulas that it stands for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nas_kd.search.additive import _NOISES, _SCALES, _spectrum


@pytest.mark.parametrize(("rows", "parts"), [(1, 5), (12, 30), (40, 9)])
def test_one_decomposition_serves_every_scale_and_noise(rows: int, parts: int) -> None:
    generator = np.random.default_rng(0)
    weighted = (generator.random((rows, parts)) < 0.3) * generator.random(parts)
    weighted[-1] = weighted[0]  # a genotype that was scored twice
    gaps = generator.normal(size=rows)
    spectrum = _spectrum(weighted)
    plain = []
    for scale, noise in itertools.product(_SCALES, _NOISES):
        covariance = scale**2 * weighted @ weighted.T + noise**2 * np.eye(rows)
        solved = np.linalg.solve(covariance, gaps)
        np.testing.assert_allclose(spectrum.over(gaps, scale, noise), solved, rtol=1e-6, atol=1e-6 / noise**2)
        plain.append(-gaps @ solved - np.linalg.slogdet(covariance)[1])
    ours = [spectrum.evidence(gaps, *pair) for pair in itertools.product(_SCALES, _NOISES)]
    np.testing.assert_allclose(ours, plain, rtol=1e-8)


def test_nothing_scored_and_nothing_varied_have_no_directions() -> None:
    assert _spectrum(np.zeros((0, 4))).vectors.shape == (0, 0)
    spectrum = _spectrum(np.zeros((3, 4)))
    assert spectrum.vectors.shape == (3, 0)
    np.testing.assert_allclose(spectrum.over(np.ones(3), 0.1, 0.5), np.full(3, 4.0))
