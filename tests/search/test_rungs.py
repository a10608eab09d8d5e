from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas_kd.budget import Cost
from nas_kd.search.rungs import EVIDENCE, PATIENCE, RungScore, deficit, expected_scores, outlook, rung_epochs

tenths = st.integers(0, 10).map(lambda tenths: tenths / 10)
scores = st.builds(
    lambda cost, score: RungScore(cost=cost, score=score, end=score),  # a rung that says all of the end
    st.builds(Cost, params=st.integers(1, 4), macs=st.integers(1, 4)),
    tenths,
)


@given(st.integers(1, 300))
def test_rungs_double_and_end_with_the_last_epoch(epochs: int) -> None:
    rungs = rung_epochs(epochs)
    assert rungs[-1] == epochs
    assert rungs[0] == 1
    assert list(rungs) == sorted(set(rungs))
    assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(rungs))


@settings(max_examples=200)
@given(scores, st.lists(scores, max_size=8), st.integers(1, 4))
def test_a_trial_is_behind_iff_enough_cheaper_ones_were_better(
    own: RungScore, peers: list[RungScore], patience: int
) -> None:
    better = [
        peer
        for peer in peers
        if peer.cost.params <= own.cost.params and peer.cost.macs <= own.cost.macs and peer.score > own.score
    ]
    assert (deficit(own, peers, patience) > 0) == (len(better) >= patience and len(peers) >= EVIDENCE)


def test_the_deficit_is_the_distance_to_the_worst_of_the_best() -> None:
    cheap = Cost(params=1, macs=1)
    peers = [RungScore(cost=cheap, score=score, end=score) for score in (0.9, 0.8, 0.7, 0.2)]
    own = RungScore(cost=Cost(params=2, macs=2), score=0.5)
    assert PATIENCE == 3
    assert round(deficit(own, peers), 9) == 0.2
    assert deficit(own, [*peers[:2], *peers[3:], peers[3]]) <= 0.0
    assert deficit(own, peers[:3]) == 0.0  # too few came to their end


def test_where_a_rung_says_little_of_the_end_only_what_is_far_behind_stops() -> None:
    cheap, generator = Cost(params=1, macs=1), np.random.default_rng(0)

    def behind(noise: float) -> bool:
        ends = 0.8 + 0.1 * generator.random(30)
        peers = [RungScore(cost=cheap, score=end + float(generator.normal(0, noise)), end=end) for end in ends]
        best = sorted(peer.score for peer in peers)[-PATIENCE]
        return deficit(RungScore(cost=cheap, score=best - 0.03), peers) > 0

    assert behind(noise=0.001)
    assert not behind(noise=0.1)


@given(st.lists(st.tuples(tenths, tenths), min_size=1, max_size=8))
def test_an_outlook_keeps_the_mean_and_never_makes_more_of_a_difference_than_it_is(
    pairs: list[tuple[float, float]],
) -> None:
    ahead = outlook(pairs)
    rung, end = (np.mean([pair[side] for pair in pairs]) for side in (0, 1))
    assert ahead.expected(float(rung)) == pytest.approx(float(end))
    assert 0 <= ahead.slope <= 1
    assert 0 <= ahead.expected(0.9) - ahead.expected(0.4) <= 0.5 + 1e-9
    assert ahead.doubt >= ahead.spread >= 0


def test_an_outlook_is_the_line_through_what_lies_on_one() -> None:
    ahead = outlook([(0.2, 0.6), (0.4, 0.7), (0.6, 0.8)])
    assert (ahead.slope, ahead.spread) == pytest.approx((0.5, 0.0))
    assert ahead.expected(0.0) == pytest.approx(0.5)
    assert outlook([(0.2, 0.6), (0.4, 0.5)]).doubt == math.inf  # says nothing, or the contrary


def trial(number: int, rungs: dict[int, float], value: float | None = None, *, reports: bool = False) -> FrozenTrial:
    """A trial with scores at rungs that came to its end, or was stopped at the last of them."""
    made = create_trial(
        state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
        value=value,
        intermediate_values=rungs if reports else None,
        user_attrs={} if reports else {f"rung/{epoch}": score for epoch, score in rungs.items()},
    )
    made.number = number
    return made


@pytest.mark.parametrize("reports", [False, True])
def test_what_was_stopped_is_expected_to_gain_what_others_did(reports: bool) -> None:
    trials = [
        trial(0, {1: 0.5, 2: 0.6, 10: 0.7}, 0.7, reports=reports),
        trial(1, {1: 0.6, 2: 0.8, 10: 0.9}, 0.9, reports=reports),
        trial(2, {1: 0.3}, reports=reports),
        trial(3, {1: 0.3, 2: 0.5}, reports=reports),
        trial(4, {}),  # over budget
        trial(5, {1: 0.1, 4: 0.2}, reports=reports),  # nothing that ended was looked at after four epochs
    ]
    assert expected_scores(trials) == {2: pytest.approx(0.55), 3: pytest.approx(0.6)}


def test_dearer_peers_never_stop_a_cheap_trial() -> None:
    dear = [RungScore(cost=Cost(params=9, macs=1), score=1.0, end=1.0)] * 9
    assert deficit(RungScore(cost=Cost(params=1, macs=1), score=0.1), dear) <= 0
