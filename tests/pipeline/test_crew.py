"""What the command that watches its workers reads of their trials."""

from __future__ import annotations

import optuna

from nas_kd.pipeline.crew import line_of


def test_a_trial_that_notes_its_costs_just_now_is_shown_without_them() -> None:
    """Each attribute is a transaction of its own: between two of them a part is there."""
    study = optuna.create_study()
    trial = study.ask()
    trial.set_user_attr("params", 1_000)
    (found,) = study.get_trials()
    assert line_of(found, epochs=4).words == "trial 0"
    trial.set_user_attr("macs", 2_000)
    (found,) = study.get_trials()
    assert line_of(found, epochs=4).words == "trial 0, 1K"
