"""Which model of a study to take and why, for someone who decides about a product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nas_kd.budget import kinds_of
from nas_kd.results.rows import ModelRow, Role, StudySummary, best_of, better_in

_LOSS = 0.01  # of the teacher's accuracy that a product may lose, unless its owner says otherwise
_BESIDES: Mapping[Role, str] = {
    "teacher": "the teacher itself",
    "uniform": "one width everywhere",
    "no teacher": "trained without a teacher",
    "random": "a random choice within the budget",
}


def advised(summary: StudySummary) -> ModelRow | None:
    """The model to take; None of an empty front.

    It is the fastest that loses at most a point beside the teacher, by validation accuracy where there is one, so that
    the test accuracy that is quoted stays an honest number; else the most accurate. A member of the front that another
    row beats in everything is never taken: that row stands in for it, and for the teacher where it knows more.
    """
    candidates = _candidates(summary)
    return min(_good(summary), key=_price, default=best_of(candidates))


def advice(summary: StudySummary) -> str:
    """Two sentences: the model to take and what is gained, and why that one; empty for an empty front."""
    chosen, teacher = advised(summary), summary.teacher
    if chosen is None:
        return ""
    gained = ", ".join(filter(None, (_gain(chosen, teacher), _accuracy(chosen, teacher))))
    return f"Take {chosen.name}{_besides(chosen)}: {gained}. {_why(summary)}"


def overtaken(summary: StudySummary) -> str:
    """Which members of the front another row beats in everything, a sentence each; empty where none is."""
    kinds = kinds_of(summary.budget)
    sentences = [
        f"{winner.name}{_besides(winner)} beats {member.name} of the front: worse in nothing, better in "
        f"{_joined(better_in(winner, member, kinds))}."
        for member, winner in summary.beaten
    ]
    if any(winner.role != "front" for _, winner in summary.beaten):
        sentences.append("A longer training of the teacher, or more trials, may change that.")
    return " ".join(sentences)


def _besides(model: ModelRow) -> str:
    return f" ({_BESIDES[model.role]})" if model.role in _BESIDES else ""


def _candidates(summary: StudySummary) -> list[ModelRow]:
    """The front without members that are beaten, and what beats those."""
    beaten = [member for member, _ in summary.beaten]
    kept = [model for model in summary.models if model.role == "front" and model not in beaten]
    winners = [winner for _, winner in summary.beaten]
    return kept + [model for model in summary.models if model in winners and model not in kept]


def _reference(summary: StudySummary) -> ModelRow | None:
    """What a model must come within a point of: the teacher, or what knows more than the teacher and beats the front;
    where the teacher's accuracy is not known, the most accurate."""
    teacher, candidates = summary.teacher, _candidates(summary)
    if teacher is None or _score(teacher, candidates) < 0:
        return best_of(candidates)
    besides = [model for model in candidates if model.role != "front"]
    return max([teacher, *besides], key=lambda model: _score(model, candidates))


def _good(summary: StudySummary) -> list[ModelRow]:
    """The candidates that are accurate enough."""
    candidates, reference = _candidates(summary), _reference(summary)
    if reference is None:
        return []
    least = _score(reference, candidates) - _LOSS
    return [model for model in candidates if _score(model, candidates) >= least]


def _by_val(candidates: Sequence[ModelRow]) -> bool:
    return all(model.val_accuracy is not None for model in candidates)


def _score(model: ModelRow, candidates: Sequence[ModelRow]) -> float:
    accuracy = model.val_accuracy if _by_val(candidates) else model.accuracy
    return -1.0 if accuracy is None else accuracy


def _price(model: ModelRow) -> tuple[float, int]:
    return model.latency_ms or 0.0, model.cost.macs


def _gain(model: ModelRow, teacher: ModelRow | None) -> str:
    """How much smaller, faster and lighter it is than the teacher."""
    if teacher is None:
        return ""
    ratios = {
        "smaller": teacher.cost.params / max(model.cost.params, 1),
        "faster": (teacher.latency_ms or 0.0) / model.latency_ms if model.latency_ms else 0.0,
        "lighter in memory": teacher.cost.peak_memory / max(model.cost.peak_memory, 1),
    }
    gains = [f"{ratio:.3g}× {word}" for word, ratio in ratios.items() if ratio >= 1.05]
    return f"{_joined(gains)} than the teacher" if gains else "no smaller or faster than the teacher"


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _accuracy(model: ModelRow, teacher: ModelRow | None) -> str:
    if model.accuracy is None:
        return ""
    images = "test" if model.test_accuracy is not None else "validation"
    theirs = None if teacher is None else teacher.test_accuracy if images == "test" else teacher.val_accuracy
    beside = "" if theirs is None else f" (the teacher {theirs:.1%})"
    return f"right on {model.accuracy:.1%} of the {images} images{beside}"


def _why(summary: StudySummary) -> str:
    good, reference = _good(summary), _reference(summary)
    images = "validation" if _by_val(_candidates(summary)) else "test"
    aim = "the teacher" if reference is not None and reference is summary.teacher else "the most accurate"
    if not good:
        return f"No model is within one point of {aim} on {images} images; this one is the most accurate."
    best = "fastest" if all(model.latency_ms for model in good) else "cheapest"
    among = "It is the only one" if len(good) == 1 else f"It is the {best} of {len(good)}"
    return f"{among} within one point of {aim} on {images} images."
