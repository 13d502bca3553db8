"""The report in a real browser: sorted, compared and read, with nothing asked of the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentic_r_plugin.report.report import ReportConfig, run
from agentic_r_plugin.report.run_folder import read_run
from tests.evaluation.browser import EXECUTABLE, Browser
from tests.evaluation.evaluation_run import HOSTILE, write_run

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium on this machine")

FIRST, SECOND = 0, 3
"""Places of agent-0 + retriever-0 and agent-1 + retriever-1 among the cells."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("report") / "run"
    write_run(home, num_questions=60, agents=["agent-0", "agent-1"], retrievers=["retriever-0", "retriever-1"])
    run(ReportConfig(run=str(home)))
    return home


@pytest.fixture(scope="module")
def chromium(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.resize(1280, 900)
        yield browser


@pytest.fixture
def browser(chromium: Browser, folder: Path) -> Browser:
    """On the freshly loaded report."""
    chromium.open(folder / "report.html")
    return chromium


def outcomes(folder: Path, place: int) -> dict[str, bool]:
    found = read_run(folder)
    return found.outcomes(found.cells[place])


def column(browser: Browser, name: str) -> list[str]:
    """The results table's column under a heading, as the page shows it."""
    headings = [text.split("\xa0")[0].strip() for text in browser.texts("#results-table thead th")]
    return browser.texts(f"#results-table tbody tr > :nth-child({headings.index(name) + 1})")


def test_the_results_sort_by_a_click_and_back(browser: Browser) -> None:
    def ems() -> list[float]:
        return [float(text.split()[0]) for text in column(browser, "EM")]

    before = ems()
    assert before != sorted(before, reverse=True) and len(set(before)) == 4
    heading = "#results-table thead th:nth-child(3)"
    browser.click(f"{heading} button")
    assert ems() == sorted(before, reverse=True)
    assert browser.evaluate(f"document.querySelector('{heading}').ariaSort") == "descending"
    best = max(before)
    assert column(browser, "agent")[0] == "agent-1" and ems()[0] == best
    browser.click(f"{heading} button")
    assert ems() == sorted(before)
    assert browser.evaluate(f"document.querySelector('{heading}').ariaSort") == "ascending"
    browser.click("#results-table thead th:nth-child(2) button")
    assert column(browser, "retriever") == ["retriever-0"] * 2 + ["retriever-1"] * 2
    assert browser.evaluate("document.querySelectorAll('#results-table [aria-sort]').length") == 1


def test_the_charts_are_drawn(browser: Browser) -> None:
    drawn = browser.evaluate(
        "[...document.querySelectorAll('svg.chart')].map(chart => [chart.ariaLabel || chart.getAttribute('aria-label'),"
        "chart.getBoundingClientRect().width, Math.max(0, ...[...chart.querySelectorAll('.curve')]"
        ".map(curve => curve.getTotalLength())), getComputedStyle(chart.querySelector('.curve')).stroke])"
    )
    lengths: dict[str, Any] = {title: (width, length) for title, width, length, _ in drawn}
    for title in ("Exact match", "Searches", "Answer seen, turn by turn", "Training exact match", "Contrastive loss"):
        width, length = lengths[title]
        assert width > 250 and length > 20, title
    assert {stroke for *_, stroke in drawn} >= {"rgb(47, 107, 208)"}


def test_two_cells_are_compared_question_by_question(browser: Browser, folder: Path) -> None:
    first, second = outcomes(folder, FIRST), outcomes(folder, SECOND)
    fixed = [key for key in first if second[key] and not first[key]]
    broken = [key for key in first if first[key] and not second[key]]
    browser.choose("#diff-first", FIRST)
    browser.choose("#diff-second", SECOND)
    assert browser.texts("#diff-kinds button") == [f"wrong → right{len(fixed)}", f"right → wrong{len(broken)}"]
    assert len(fixed) > 11
    assert len(browser.texts("#diff-list details")) == 10
    while browser.evaluate("!document.getElementById('diff-more').hidden"):
        browser.click("#diff-more")
    shown = browser.texts("#diff-list .q")
    assert {text.split("no. ")[1].split()[0] for text in shown} == {key.removeprefix("q") for key in fixed}

    browser.click("#diff-list details:nth-child(2) summary")
    opened = "#diff-list details:nth-child(2)"
    headings = [text.partition("\n")[0] for text in browser.texts(f"{opened} .side h3")]
    assert headings == ["agent-0 + retriever-0", "agent-1 + retriever-1"]
    number = browser.texts(f"{opened} .q")[0].split("no. ")[1].split()[0]
    wrong, right = browser.texts(f"{opened} .side")
    assert "Ada Lom birth town 1" in wrong and f"Awe {number}" not in wrong
    assert "Ada Lom birth town 1" in right and right.endswith(f"Answer\nAwe {number}")
    assert f"Awe {number}" in browser.texts(f"{opened} .side.right mark")

    browser.click("#diff-kinds button:nth-child(2)")
    assert len(browser.texts("#diff-list details")) == min(len(broken), 10)


def test_text_of_models_and_questions_stays_text(browser: Browser) -> None:
    assert "<b>Ada & Lom</b>" in browser.texts("#diff-list .q")[0]
    assert any(HOSTILE in text for text in browser.texts("#diff-list details[open] .piece.think"))
    assert browser.evaluate("document.title") == "Agentic-R: run"
    assert browser.evaluate("document.querySelectorAll('#diff b:not(#diff-kinds b), #diff script').length") == 0


def test_nothing_is_asked_of_the_network_and_nothing_complains(browser: Browser, folder: Path) -> None:
    assert set(browser.requests) == {(folder / "report.html").as_uri()}
    assert browser.errors == []
    browser.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    browser.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    for what in ("Connecting to 'http://127.0.0.1:9/'", "image 'http://127.0.0.1:9/x.png'"):
        assert any(what in text and "Content Security Policy" in text for text in browser.errors), what
    browser.errors.clear()


def test_it_fits_a_phone_and_has_a_dark_side(browser: Browser) -> None:
    browser.resize(390, 844)
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    small = browser.evaluate(
        "[...document.querySelectorAll('svg.chart text')].map(text => text.getBoundingClientRect().height)"
    )
    assert min(small) > 9
    background = "getComputedStyle(document.body).backgroundColor"
    light = browser.evaluate(background)
    browser.resize(1280, 900, dark=True)
    dark = browser.evaluate(background)
    assert (light, dark) == ("rgb(251, 250, 247)", "rgb(20, 23, 26)")
    browser.click("#theme")
    assert browser.evaluate(background) == light
    browser.resize(1280, 900)


def test_one_cell_alone_is_read_by_outcome(chromium: Browser, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", num_questions=12, agents=["own"], retrievers=["e5"])
    run(ReportConfig(run=str(folder / "evaluation")))
    chromium.open(folder / "evaluation" / "report.html")
    right = sum(outcomes(folder, 0).values())
    assert chromium.texts("#diff-kinds button") == [f"right{right}", f"wrong{12 - right}"]
    assert len(chromium.texts("#diff-list details[open] .side")) == 1
    assert chromium.evaluate("document.getElementById('diff-first').checkVisibility()") is False
    assert chromium.evaluate("document.querySelectorAll('#agent').length") == 0
    # The numbers are of all questions, also where the page carries the trajectories of a few.
    run(ReportConfig(run=str(folder / "evaluation"), num_trajectories=5), resume=True)
    chromium.open(folder / "evaluation" / "report.html")
    assert chromium.texts("#diff-kinds button") == [f"right{right}", f"wrong{12 - right}"]
    assert "a larger num_trajectories" in chromium.texts("#diff-note")[0]
