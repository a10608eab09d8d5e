from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from nas_kd.budget import parse_budget
from nas_kd.errors import OutputError
from nas_kd.genotype import Choice, Genotype
from nas_kd.results.figures import duration
from nas_kd.results.report import beside_uniform, headline, panels, render_report, write_report
from nas_kd.results.rows import ModelRow, StudySummary

SECTIONS = (
    "Models",
    "The front",
    "Latency beside MACs",
    "What each block became",
    "Compare two models",
    "Optimisation history",
    "Parameter importances",
    "Time per stage",
    "How far to trust the ranking",
    "Notes",
    "How to reproduce",
)
EVIL = "</script><script>alert('x')</script><img src=x onerror=y>&\"'"


class Page(HTMLParser):
    """The page's text, its tags with their attributes, and its plots' data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.plots: list[dict[str, Any]] = []
        self.scripts = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "circle"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "circle"):  # <path/> of the legend
            return
        assert self.open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "script":
            if attributes.get("type") == "application/json":
                self.plots.append(json.loads(data))
            else:
                self.scripts += 1
        elif tag != "style":
            self.words.append(data)
            if tag == "h2":
                self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def page(summary: StudySummary) -> Page:
    return Page(render_report(summary))


def without(summary: StudySummary, field: str) -> StudySummary:
    return replace(summary, models=tuple(replace(model, **{field: None}) for model in summary.models))


def test_nothing_is_fetched(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_outside_plotly_the_page_names_no_address(summary: StudySummary) -> None:
    text = render_report(summary)
    assert text.count(get_plotlyjs()) == 1
    assert not re.search(r"https?:|url\(|@import", text.replace(get_plotlyjs(), ""))


def test_sections_in_order_and_elements_closed(page: Page) -> None:
    assert tuple(page.headings) == SECTIONS
    assert page.open == []


def test_every_model_and_fact_is_named(page: Page, summary: StudySummary) -> None:
    for model in summary.models:
        assert model.name in page.text
    facts = (summary.command, summary.dataset, "seed 0", *summary.notes, "2 CPU cores, x86_64", "2 notes below")
    for fact in facts:
        assert fact in page.text
    assert "timm.create_model('local-dir:resnet18-0.98M-97.8', pretrained=True)" in page.text


def test_the_result_in_one_sentence(summary: StudySummary) -> None:
    assert headline(summary) == (
        "resnet18-0.98M-97.8 reaches 97.5% test accuracy (teacher 98.3%) with 11.4× fewer params and 4.1× fewer MACs"
        " than the teacher, 2.8× faster, within 1M params and 44.65M MACs."
    )
    assert headline(replace(summary, models=summary.models[:1])).startswith("No model was found within 1M params")
    assert "2.5% test accuracy" not in headline(without(summary, "test_accuracy"))
    assert "97.8% validation accuracy (teacher 98.6%)" in headline(without(summary, "test_accuracy"))
    assert "982.1K params and 36.34M MACs, within" in headline(replace(summary, models=summary.models[1:]))


def test_the_front_is_compared_at_the_speed_of_one_width_everywhere(summary: StudySummary) -> None:
    front = next(model for model in summary.models if model.role == "front")
    uniform = replace(front, name="narrow", role="uniform", latency_ms=2.0, val_accuracy=0.9, test_accuracy=0.91)
    fast, slow = (replace(front, name=f"at {ms} ms", latency_ms=ms) for ms in (1.0, 3.0))
    assert beside_uniform((fast, slow, uniform)) == (
        f"At most as slow as one width everywhere (91.0% in 2 ms): at 1.0 ms, {front.test_accuracy:.1%} in 1 ms."
    )
    assert beside_uniform((slow, uniform)).startswith("No model of the front is as fast as one width everywhere")
    assert beside_uniform((fast, slow)) == ""
    assert "at 1.0 ms, " in render_report(replace(summary, models=(fast, slow, uniform)))


def test_a_model_over_the_budget_is_never_called_within(summary: StudySummary) -> None:
    fat = replace(summary.models[1], cost=replace(summary.models[1].cost, params=1_500_000))
    sentence = headline(replace(summary, models=(summary.models[0], fat)))
    assert "over budget: params 1.5M is 50% over 1M" in sentence
    assert "within" not in sentence


def test_bytes_are_shown_where_the_budget_bounds_them(summary: StudySummary) -> None:
    assert ">size</th>" not in render_report(summary)
    budget = parse_budget("params=1M,size=4M,peak_memory=100K", summary.models[0].cost)
    text = render_report(replace(summary, budget=budget))
    for title, cell in (("size", "44.74M"), ("peak memory", "163.8K")):
        assert text.count(f'<th scope="col">{title}</th>') == 1
        assert f"<td>{cell}</td>" in text
    assert "Accuracy over bytes of activations at once" in text


def test_the_best_is_chosen_by_validation_accuracy(summary: StudySummary) -> None:
    lucky = replace(summary.models[2], test_accuracy=0.999)
    changed = replace(summary, models=(*summary.models[:2], lucky, *summary.models[3:]))
    assert changed.best == summary.models[1]


def test_plots_hold_the_data(page: Page, summary: StudySummary) -> None:
    assert len(page.plots) == 7
    traces = {trace["name"]: trace for trace in page.plots[0]["data"]}
    assert set(traces) == {"trials", "teacher", "front", "uniform width", "without a teacher", "random genotype"}
    members = sorted((m for m in summary.models if m.role == "front"), key=lambda m: m.cost.params)
    assert traces["front"]["x"] == [member.cost.params for member in members]
    assert traces["front"]["y"] == [member.test_accuracy for member in members]
    assert len({(t["marker"]["symbol"], t["marker"]["color"]) for n, t in traces.items() if n != "trials"}) == 5
    assert page.plots[0]["layout"]["shapes"][0]["x0"] == 1_000_000
    blocks = page.plots[3]["data"][0]
    assert len(blocks["z"]) == 9
    assert blocks["text"][6] == ["100%", "dropped"] * 3


def test_best_so_far_never_falls_and_counts_trained_trials_only(summary: StudySummary) -> None:
    figure = next(panel for panel in panels(summary) if panel.title == "Optimisation history").figures[0][1]
    best = next(trace for trace in figure.data if trace.name == "best so far")
    trained = [trial for trial in summary.trials if trial.state == "trained"]
    assert list(best.y) == sorted(best.y)
    assert best.y[-1] == max(trial.score for trial in trained if trial.score is not None)
    assert {trace.name for trace in figure.data} >= {"over budget (13)", "failed (4)"}


def test_every_text_is_escaped(summary: StudySummary) -> None:
    model = replace(summary.models[1], name=EVIL, path=EVIL, digest=EVIL)
    choices = Genotype.of({EVIL: Choice(width=0.5)})
    trial = replace(summary.trials[0], source=EVIL, note=EVIL)
    evil = replace(
        summary,
        study_name=EVIL, command=EVIL, base=EVIL, dataset=EVIL, trials=(trial,), notes=(EVIL,),
        models=(replace(summary.models[0], name=EVIL, genotype=choices), replace(model, genotype=choices)),
        importances=((EVIL, 0.5),), stages=((EVIL, 1.0),), environment=((EVIL, EVIL),),
    )  # fmt: skip
    page = Page(render_report(evil))
    assert page.scripts == 3  # plotly and two of ours
    assert not [tag for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]
    assert "alert('x')" in page.text
    for plot in page.plots:
        assert "<script" not in json.dumps(plot)
        assert "<img" not in json.dumps(plot)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"importances": ()}, "need several finished trials"),
        ({"importances": (("layer1.0.width", math.nan),)}, "need several finished trials"),
        ({"stages": ()}, "no stage was timed"),
        ({"trials": ()}, "no trial was trained"),
        ({"notes": ()}, "Nothing to warn of."),
        ({"models": ()}, "no model has an accuracy"),
    ],
)
def test_what_is_missing_is_said(summary: StudySummary, change: dict[str, Any], line: str) -> None:
    page = Page(render_report(replace(summary, **change)))
    assert line in page.text
    assert tuple(page.headings) == SECTIONS


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("test_accuracy", "No model was tested on the test split"),
        ("latency_ms", "fewer than two models have a measured latency"),
        ("genotype", "no student whose blocks are known"),
    ],
)
def test_what_the_models_lack_is_said(summary: StudySummary, field: str, line: str) -> None:
    assert line in Page(render_report(without(summary, field))).text


def test_a_single_front_model(summary: StudySummary) -> None:
    page = Page(render_report(replace(summary, models=summary.models[:2])))
    assert "The front has a single model" in page.text
    assert len(page.plots) == 7


def test_a_score_that_is_no_accuracy_is_not_drawn_as_one(summary: StudySummary) -> None:
    losses = tuple(replace(trial, score=trial.score and -50 * trial.score) for trial in summary.trials)
    page = Page(render_report(replace(summary, trials=losses)))
    assert "the study's score is no accuracy" in page.text
    assert "trials" not in {trace["name"] for trace in page.plots[0]["data"]}


def test_a_score_that_is_not_finite_is_left_out(summary: StudySummary) -> None:
    broken = (*summary.trials, replace(summary.trials[0], number=60, state="trained", score=math.nan))
    assert "1 trials without a score are left out" in Page(render_report(replace(summary, trials=broken))).text


def test_models_of_one_name_keep_a_column_each(summary: StudySummary) -> None:
    twin = replace(summary.models[2], name=summary.models[1].name)
    figure = panels(replace(summary, models=(*summary.models[:2], twin)))[2].figures[0][1]
    assert list(figure.layout.xaxis.tickvals) == [0, 1]


def test_a_withheld_teacher_accuracy_is_said(summary: StudySummary) -> None:
    teacher: ModelRow = replace(summary.models[0], val_accuracy=None, test_accuracy=None)
    page = Page(render_report(replace(summary, models=(teacher, *summary.models[1:]))))
    assert "The teacher's accuracy is not quoted." in page.text
    assert "(teacher" not in page.text.split("Models")[0]


def test_write_replaces_the_old_report(tmp_path: Path, summary: StudySummary) -> None:
    path = tmp_path / "results" / "report.html"
    write_report(path, replace(summary, study_name="old"))
    write_report(path, summary)
    assert path.read_text(encoding="utf-8") == render_report(summary)
    assert list(path.parent.iterdir()) == [path]


def test_a_report_that_cannot_be_written(tmp_path: Path, summary: StudySummary) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write_report(tmp_path / "file" / "report.html", summary)


def test_duration() -> None:
    assert [duration(s) for s in (0, 59.96, 60, 3599.9, 7384)] == [
        "0.0 s",
        "1 min 0 s",
        "1 min 0 s",
        "1 h 0 min",
        "2 h 3 min",
    ]
