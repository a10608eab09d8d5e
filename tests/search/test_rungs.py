from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from nas_kd.budget import Cost
from nas_kd.search.rungs import PATIENCE, RungScore, deficit, rung_epochs

scores = st.builds(
    RungScore,
    cost=st.builds(Cost, params=st.integers(1, 4), macs=st.integers(1, 4)),
    score=st.integers(0, 10).map(lambda tenths: tenths / 10),
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
    assert (deficit(own, peers, patience) > 0) == (len(better) >= patience)


def test_the_deficit_is_the_distance_to_the_worst_of_the_best() -> None:
    cheap = Cost(params=1, macs=1)
    peers = [RungScore(cost=cheap, score=score) for score in (0.9, 0.8, 0.7, 0.2)]
    own = RungScore(cost=Cost(params=2, macs=2), score=0.5)
    assert PATIENCE == 3
    assert round(deficit(own, peers), 9) == 0.2
    assert deficit(own, peers[:2]) == 0.0


def test_dearer_peers_never_stop_a_cheap_trial() -> None:
    dear = [RungScore(cost=Cost(params=9, macs=1), score=1.0)] * 9
    assert deficit(RungScore(cost=Cost(params=1, macs=1), score=0.1), dear) <= 0
