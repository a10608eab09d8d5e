"""The model that a report says to take, and why."""

from __future__ import annotations

from dataclasses import replace

from nas_kd.results.advice import advice, advised, overtaken
from nas_kd.results.report import render_report
from nas_kd.results.rows import StudySummary


def with_accuracies(summary: StudySummary, **accuracies: float) -> StudySummary:
    """The models of a role with this accuracy, validation and test alike."""
    models = (
        replace(model, val_accuracy=accuracies[model.role], test_accuracy=accuracies[model.role])
        if model.role in accuracies
        else model
        for model in summary.models
    )
    return replace(summary, models=tuple(models))


def test_what_is_gained_and_why_that_one(summary: StudySummary) -> None:
    text = advice(summary)
    assert text == (
        "Take resnet18-0.98M-97.8: 11.4× smaller, 2.81× faster and 2.5× lighter in memory than the teacher, right on "
        "97.5% of the test images (the teacher 98.3%). It is the only one within one point of the teacher on "
        "validation images."
    )
    assert text in render_report(summary)


def test_of_several_that_are_good_enough_the_fastest_and_of_these_the_cheapest(summary: StudySummary) -> None:
    text = advice(with_accuracies(summary, front=0.98))
    assert text.startswith("Take resnet18-0.30M-95.7: 37.1× smaller, ")  # as fast as the largest one
    assert text.endswith(
        "It is the fastest of 3 within one point of the teacher on validation images."
    )  # three are beaten


def test_none_is_good_enough(summary: StudySummary) -> None:
    text = advice(with_accuracies(summary, teacher=0.995))
    assert text.startswith("Take resnet18-0.98M-97.8: ")
    assert text.endswith(
        "No model is within one point of the teacher on validation images; this one is the most accurate."
    )


def test_what_is_not_known_is_not_said(summary: StudySummary) -> None:
    assert advice(replace(summary, models=())) == ""
    front = tuple(replace(model, latency_ms=None) for model in summary.models if model.role == "front")
    alone = advice(replace(summary, models=front))
    assert alone == (
        "Take resnet18-0.74M-97.1: right on 96.8% of the test images. It is the cheapest of 2 within one point of "
        "the most accurate on validation images."
    )
    unseen = tuple(replace(model, val_accuracy=None) for model in summary.models)
    assert "on test images" in advice(replace(summary, models=unseen))


def test_what_a_baseline_beats_is_said_and_not_taken(summary: StudySummary) -> None:
    assert summary.beaten == ()
    assert overtaken(summary) == ""
    largest = next(model for model in summary.models if model.role == "front")
    changed = with_accuracies(summary, **{"no teacher": 0.99})  # the largest one's blocks, without a teacher
    (winner,) = (model for model in changed.models if model.role == "no teacher")
    assert changed.beaten == ((largest, winner),) or winner.latency_ms > largest.latency_ms
    fast = replace(winner, latency_ms=largest.latency_ms)
    changed = replace(changed, models=tuple(fast if model is winner else model for model in changed.models))
    assert changed.beaten == ((largest, fast),)
    assert overtaken(changed).startswith(
        "resnet18-0.98M-95.1 (trained without a teacher) beats resnet18-0.98M-97.8 of the front: worse in nothing, "
        "better in validation accuracy and test accuracy."
    )
    assert advised(changed) == fast
    assert advice(changed).startswith("Take resnet18-0.98M-95.1 (trained without a teacher): 11.4× smaller")
    text = render_report(changed)
    assert "beaten by resnet18-0.98M-95.1" in text
    assert "local-dir:resnet18-0.98M-97.8" not in text


def test_what_is_worse_in_one_thing_beats_nothing(summary: StudySummary) -> None:
    winner = with_accuracies(summary, uniform=0.99)
    assert winner.beaten == ((winner.models[1], winner.models[7]),) or winner.models[7].latency_ms > 2


def test_a_teacher_whose_accuracy_is_withheld_is_no_measure(summary: StudySummary) -> None:
    teacher = replace(summary.models[0], val_accuracy=None)
    text = advice(replace(summary, models=(teacher, *summary.models[1:])))
    assert text.endswith("within one point of the most accurate on validation images.")
