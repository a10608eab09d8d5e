"""A digest is trained once: every order in which two workers may write and read."""

from __future__ import annotations

import itertools
import threading

import optuna
import pytest
from optuna.trial import TrialState

from nas_kd.search.claims import REUSED, RUNG, claim


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(directions=["maximize"])


def started(study: optuna.Study, digest: str = "d") -> optuna.Trial:
    trial = study.ask()
    trial.set_user_attr("digest", digest)
    return trial


def test_the_first_claims_and_the_second_leaves_it(study: optuna.Study) -> None:
    first = started(study)
    assert claim(first, "d") is None
    second = started(study)
    left = claim(second, "d")
    assert left is not None
    assert left.number == first.number
    assert claim(started(study, "other"), "other") is None


def test_the_later_of_two_undecided_leaves_and_the_earlier_waits_for_that(study: optuna.Study) -> None:
    earlier, later = started(study), started(study)
    waits = []

    def sleep(seconds: float) -> None:  # what the later one does in the meantime
        waits.append(seconds)
        left = claim(later, "d")
        assert left is not None
        assert left.number == earlier.number
        later.set_user_attr(REUSED, left.number)

    assert claim(earlier, "d", sleep=sleep) is None
    assert len(waits) == 1


def test_a_later_one_that_was_first_to_claim_keeps_it(study: optuna.Study) -> None:
    earlier, later = study.ask(), started(study)
    assert claim(later, "d") is None
    earlier.set_user_attr("digest", "d")
    left = claim(earlier, "d")
    assert left is not None
    assert left.number == later.number


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED])
def test_what_was_trained_is_not_trained_again(study: optuna.Study, state: TrialState) -> None:
    done = started(study)
    done.set_constraint(RUNG, 0.0)
    study.tell(done, 1.0 if state == TrialState.COMPLETE else None, state)
    trial = started(study)
    left = claim(trial, "d")
    assert left is not None
    assert left.number == 0


def test_what_failed_or_was_over_budget_is_nobodys(study: optuna.Study) -> None:
    for state in (TrialState.FAIL, TrialState.PRUNED):
        study.add_trial(optuna.trial.create_trial(state=state, user_attrs={"digest": "d"}))
    assert claim(started(study), "d") is None


@pytest.mark.parametrize("count", [2, 5])
def test_of_many_threads_one_trains(count: int) -> None:
    """Real interleavings of the write and the reads, many times."""
    study = optuna.create_study(directions=["maximize"])
    for round_ in range(20):
        digest, winners = f"d{round_}", []
        barrier = threading.Barrier(count)

        def run(digest: str = digest, winners: list[int] = winners, barrier: threading.Barrier = barrier) -> None:
            trial = study.ask()
            barrier.wait()
            trial.set_user_attr("digest", digest)
            left = claim(trial, digest)
            if left is None:
                winners.append(trial.number)
            else:
                trial.set_user_attr(REUSED, left.number)

        threads = [threading.Thread(target=run) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1


def test_no_order_of_steps_lets_two_train() -> None:
    """The protocol as a model: each of two writes its digest, then looks until it has decided."""
    for schedule in itertools.product((0, 1), repeat=12):
        written, claimed, left = [False, False], [False, False], [False, False]
        for who in schedule:
            other = 1 - who
            if claimed[who] or left[who]:
                continue
            if not written[who]:
                written[who] = True
            elif not written[other] or left[other]:
                claimed[who] = True
            elif claimed[other] or other < who:
                left[who] = True
        assert sum(claimed) <= 1
