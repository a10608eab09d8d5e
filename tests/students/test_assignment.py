"""Channels dealt to taps: as good as the exact assignment, with every share used up."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from nas_kd.students.assignment import deal


@pytest.mark.parametrize(("channels", "taps"), [(20, 9), (300, 9), (300, 25), (200, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_deal_keeps_as_much_as_the_exact_assignment(channels: int, taps: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scales = np.exp(generator.standard_normal((channels, 1))) * np.linspace(0.2, 2, taps)
    energy = generator.standard_normal((channels, taps)) ** 2 * scales
    shares = [channels // taps + (tap < channels % taps) for tap in range(taps)]
    taken = deal(energy, shares)
    places = np.repeat(np.arange(taps), shares)
    rows, columns = linear_sum_assignment(-energy[:, places])
    best = energy[rows, places[columns]].sum()
    assert np.array_equal(np.bincount(taken, minlength=taps), shares)
    assert energy[np.arange(channels), taken].sum() >= 0.9999 * best


def test_channels_that_are_all_alike_are_dealt_too() -> None:
    taken = deal(np.ones((270, 9)), [30] * 9)
    assert np.array_equal(np.bincount(taken), [30] * 9)
    assert np.array_equal(np.bincount(deal(np.zeros((270, 9)), [30] * 9)), [30] * 9)
