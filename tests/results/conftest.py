"""A study's result as the search hands it over: resnet18's real blocks, many models, trials of every kind."""

from __future__ import annotations

import math
import random

import pytest

from nas_kd.budget import Cost, parse_budget
from nas_kd.genotype import Choice, Genotype
from nas_kd.results.rows import ModelRow, Role, StudySummary, TrialRow

TEACHER = Cost(
    params=11_175_370, macs=148_820_992, size=44_740_162, peak_memory=163_840
)  # resnet18 for one channel and ten classes
BLOCKS = ("conv1", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)))
CONVS = ("standard", "depthwise", "blueprint", "group4", "shift")


def genotype(seed: int) -> Genotype:
    draw = random.Random(seed)
    choices = {
        block: Choice(
            width=draw.choice((0.25, 0.5, 0.75, 1.0)), kernel_size=draw.choice((3, 5, 7)), conv=draw.choice(CONVS)
        )
        for block in BLOCKS[1:]
    }
    return Genotype.of({"conv1": Choice(width=0.5), **choices, "layer3.1": Choice(keep=seed % 2 == 0)})


def model(
    role: Role, params: int, accuracy: float | None, *, latency_ms: float | None = 3.2, seed: int = 0
) -> ModelRow:
    percent = "" if accuracy is None else f"-{100 * accuracy:.1f}"
    name = "resnet18" if role == "teacher" else f"resnet18-{params / 1e6:.2f}M{percent}"
    return ModelRow(
        name=name,
        role=role,
        digest=genotype(seed).digest,
        cost=TEACHER
        if role == "teacher"
        else Cost(params=params, macs=37 * params, size=4 * params, peak_memory=65_536),
        val_accuracy=accuracy,
        test_accuracy=None if accuracy is None else accuracy - 0.003,
        latency_ms=latency_ms,
        path=name if role == "front" else None,
        genotype=None if role == "teacher" else genotype(seed),
    )


def trials(count: int) -> tuple[TrialRow, ...]:
    draw = random.Random(7)
    rows = []
    for number in range(count):
        params = round(10 ** draw.uniform(4.8, 6))
        score = 0.97 - 0.12 * math.exp(-params / 2.5e5) - abs(draw.gauss(0, 0.02)) - 0.06 * math.exp(-number / 8)
        state = draw.choices(("trained", "stopped", "over budget", "failed"), (60, 15, 20, 5))[0]
        trained = state in ("trained", "stopped")
        rows.append(
            TrialRow(
                number=number,
                state=state,
                digest=genotype(number).digest,
                cost=Cost(params=params if trained else 3 * params, macs=37 * params),
                score=score if trained else None,
                rungs=((1, score - 0.1), (2, score)) if trained else (),
                seconds=3.1,
                source="warm start" if number < 8 else "sampler",
                note="over budget: params 1.4M is 40% over 1M" if state == "over budget" else "",
            )
        )
    return tuple(rows)


@pytest.fixture
def summary() -> StudySummary:
    sizes = ((982_114, 0.978), (741_002, 0.971), (520_330, 0.966), (301_555, 0.957), (150_021, 0.943), (80_400, 0.902))
    models = (
        model("teacher", 0, 0.986, latency_ms=5.61),
        *(
            model("front", params, accuracy, latency_ms=2 + index % 3, seed=index)
            for index, (params, accuracy) in enumerate(sizes)
        ),
        model("uniform", 955_010, 0.961, latency_ms=2.4, seed=20),
        model("no teacher", 982_114, 0.951, seed=0),
        model("random", 930_233, 0.922, latency_ms=4.7, seed=21),
    )
    return StudySummary(
        study_name="resnet18-digits-params=1M",
        command="python -m nas_kd.study --budget params=1M --seed 0",
        seed=0,
        base="resnet18",
        dataset="digits (1,797 images, 10 classes)",
        budget=parse_budget("params=1M,macs=30%", TEACHER),
        models=models,
        trials=trials(60),
        importances=tuple(
            (f"{block}.{what}", 1 / (3 + index) / 3) for index, block in enumerate(BLOCKS) for what in ("width", "conv")
        ),
        stages=(("teacher", 41.2), ("cache", 3.3), ("search", 195.0), ("refine", 122.8), ("export and test", 8.1)),
        notes=(
            "the teacher saw the validation images: its accuracy is not quoted",
            "latency is not stable on this machine",
        ),
        environment=(("python", "3.11.2"), ("torch", "2.9.0"), ("timm", "1.0.20"), ("hardware", "2 CPU cores, x86_64")),
    )
