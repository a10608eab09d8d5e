"""The report as somebody reads it in a browser: on a phone, on paper, with the keyboard, without scripts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Tab, browse

from nas_kd.genotype import Choice
from nas_kd.results.compare import block_words, comparison
from nas_kd.results.report import write_report
from nas_kd.results.rows import StudySummary

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: .ci/run installs it")
PHONE, DESKTOP, PAPER = 360, 1280, 690
PLOT = "document.querySelector('.plot .main-svg').getBoundingClientRect().width"
TWO = "Array.from(document.querySelectorAll('#compare thead th')).slice(1).map(cell => cell.textContent)"
ROWS = (
    "Array.from(document.querySelectorAll('#compare .blocks tr'))"
    ".map(row => [row.className, ...Array.from(row.cells).map(cell => cell.textContent)])"
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browse(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def report(tmp_path: Path, summary: StudySummary) -> Path:
    write_report(tmp_path / "report.html", summary)
    return tmp_path / "report.html"


@needs_browser
def test_two_models_are_compared_at_the_desk_on_a_phone_and_on_paper(
    tab: Tab, report: Path, summary: StudySummary
) -> None:
    tab.open(report, width=DESKTOP)
    advised, uniform = tab.see(TWO)
    assert (advised, uniform) == ("resnet18-0.98M-97.8", "resnet18-0.96M-96.1")
    tab.click("#pick select")
    tab.press("ArrowDown")  # in the open list: the second of the front
    tab.press("Enter")
    tab.press("Tab")
    tab.press("ArrowUp")  # in the other one, which a keyboard reaches and changes without opening it
    left, right = tab.see(TWO)
    assert (left, right) == ("resnet18-0.74M-97.1", "resnet18-0.08M-90.2")
    genotypes = {model.name: model.genotype for model in summary.models}
    rows = tab.see(ROWS)
    assert [row[1] for row in rows] == list(genotypes[left] or ())
    for mark, block, *two in rows:
        assert two == [block_words((genotypes[name] or {})[block]) for name in (left, right)]
        assert (mark == "differs") == (two[0] != two[1])
    differ = sum(mark == "differs" for mark, *_ in rows)
    assert tab.see("document.querySelector('#pick output').textContent") == f"{differ} of 9 blocks differ, marked ≠"

    # the same page on a phone, and on the phone's paper
    tab.resize(width=PHONE)
    tab.until(f"{PLOT} < {PHONE}")
    assert tab.width() <= PHONE
    tab.see("window.dispatchEvent(new Event('beforeprint'))")
    tab.until(f"{PLOT} === {PAPER}")
    tab.see("window.dispatchEvent(new Event('afterprint'))")
    tab.until(f"{PLOT} < {PHONE}")


@needs_browser
def test_without_scripts_all_models_stand_side_by_side(tab: Tab, report: Path, summary: StudySummary) -> None:
    tab.open(report, width=PHONE, scripts=False)
    assert tab.width() <= PHONE
    assert tab.count("#compare thead th") == 1 + sum(model.genotype is not None for model in summary.models)
    assert tab.count("#pick[hidden]") == 1


def test_blocks_in_words() -> None:
    assert block_words(Choice(width=0.5, kernel_size=5, conv="depthwise")) == "50% wide, depthwise 5×5"
    assert block_words(Choice(keep=False)) == "dropped"
    assert block_words(Choice()) == "100% wide"


def test_one_model_is_compared_with_nothing(summary: StudySummary) -> None:
    assert comparison(replace(summary, models=summary.models[:2]), summary.models[:2], ()) is None
