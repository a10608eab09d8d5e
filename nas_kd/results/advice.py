"""Which model of a study to take and why, for someone who decides about a product."""

from __future__ import annotations

from collections.abc import Sequence

from nas_kd.results.rows import ModelRow, StudySummary, best_of

_LOSS = 0.01  # of the teacher's accuracy that a product may lose, unless its owner says otherwise


def advice(summary: StudySummary) -> str:
    """Two sentences: the model to take and what is gained, and why that one; empty for an empty front.

    It is the fastest of the front that loses at most a point beside the teacher, by validation accuracy where there is
    one, so that the test accuracy that is quoted stays an honest number; else the most accurate.
    """
    front, teacher = [model for model in summary.models if model.role == "front"], summary.teacher
    best = best_of(front)
    if best is None:
        return ""
    by_val = all(model.val_accuracy is not None for model in front)
    aim = _score(teacher, by_val) if teacher is not None else None
    reference = "the teacher" if aim is not None else "the most accurate"
    least = (_score(best, by_val) if aim is None else aim) - _LOSS
    good = [model for model in front if _score(model, by_val) >= least]
    chosen = min(good, key=_price, default=best)
    images = "validation" if by_val else "test"
    gained = ", ".join(filter(None, (_gain(chosen, teacher), _accuracy(chosen, teacher))))
    return f"Take {chosen.name}: {gained}. {_why(good, reference, images)}"


def _score(model: ModelRow, by_val: bool) -> float:
    accuracy = model.val_accuracy if by_val else model.accuracy
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


def _why(good: Sequence[ModelRow], reference: str, images: str) -> str:
    if not good:
        return f"No model is within one point of {reference} on {images} images; this one is the most accurate."
    best = "fastest" if all(model.latency_ms for model in good) else "cheapest"
    among = "It is the only one" if len(good) == 1 else f"It is the {best} of {len(good)}"
    return f"{among} within one point of {reference} on {images} images."
