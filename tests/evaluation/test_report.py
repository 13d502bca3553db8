"""The report: self-contained, complete, tolerant of what is not there yet, and readable in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agentic_r_plugin.errors import OutputExistsError, RecordError
from agentic_r_plugin.evaluation.report import ReportConfig, run
from agentic_r_plugin.evaluation.transcript import pieces
from agentic_r_plugin.protocol import compact, search_r1
from tests.evaluation.evaluation_run import write_run

VOID = {"meta", "link", "br", "input", "img", "hr", "circle", "line", "path"}


class Page(HTMLParser):
    """Collects what a page refers to and what it says; checks that tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing that is open"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("report") / "quickstart", num_questions=40)
    run(ReportConfig(run=str(folder)))
    return folder


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_asks_nothing_of_the_network(finished: Path) -> None:
    html, found = (finished / "report.html").read_text(encoding="utf-8"), page(finished)
    assert found.references and all(link.startswith("#") or link == "data:," for link in found.references)
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html


def test_every_tag_is_closed_and_every_link_leads_somewhere(finished: Path) -> None:
    found = page(finished)
    assert found.open == []
    assert {link.removeprefix("#") for link in found.references if link.startswith("#")} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))


def test_the_page_holds_results_curves_costs_and_trajectories(finished: Path) -> None:
    found = page(finished)
    best = max(
        json.loads((finished / "evaluation" / "matrix.json").read_text())["cells"],
        key=lambda cell: cell["metrics"]["agentic_em"]["mean"],
    )
    em = best["metrics"]["agentic_em"]
    assert f"{em['mean'] * 100:.1f} [{em['low'] * 100:.1f}, {em['high'] * 100:.1f}]" in found.text
    assert found.tags.count("svg") == 9 + 1 + 1
    for words in (
        "Training the retriever",
        "Held-out exact match",
        "Contrastive loss",
        "Queries with a positive",
        "Correct by relevance, iteration 2",
        "5 min 10 s",
        "wrong → right",
        "Passages (environment)",
        "iteration 1, step 20: ",
    ):
        assert words in found.text or words in (finished / "report.html").read_text(), words


def test_text_of_questions_and_passages_is_escaped(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "<b>Ada" not in html
    assert "painter &lt;b&gt;Ada &amp; Lom&lt;/b&gt;" in html


def test_the_markdown_holds_the_same_table(finished: Path) -> None:
    text = (finished / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Agentic-R: quickstart\n")
    assert "| fictional_world | agent-2 | retriever-2 | 40 " in text
    assert "| 2 | train-agent | 10 min 20 s | 1,280 | 2,900 | 91,000 |" in text


def test_a_report_is_replaced_only_when_asked_for(finished: Path) -> None:
    with pytest.raises(OutputExistsError, match=r"report\.html already exists"):
        run(ReportConfig(run=str(finished)))
    run(ReportConfig(run=str(finished), title="Again"), resume=True)
    assert "<h1>Again</h1>" in (finished / "report.html").read_text()
    run(ReportConfig(run=str(finished)), resume=True)


@pytest.mark.parametrize(
    ("missing", "note"),
    [
        ("evaluation", "No evaluation yet"),
        ("costs.jsonl", "No costs.jsonl"),
        ("iteration-1/agent", "Iteration 1: no agent/metrics.jsonl."),
        ("iteration-2/data", "Iteration 2: no data/*.report.json."),
        ("iteration-1/data/correctness.jsonl", None),
        ("evaluation/agent-2-retriever-0-fictional_world/per_question.jsonl", None),
        ("config.yaml", None),
    ],
)
def test_a_missing_part_is_left_out_with_a_note(finished: Path, tmp_path: Path, missing: str, note: str | None) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    target = folder / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    run(ReportConfig(run=str(folder)), resume=True)
    found = page(folder)
    assert found.open == [] and (note is None or note in found.text)


def test_the_folder_of_evaluate_alone_is_enough(finished: Path, tmp_path: Path) -> None:
    run(ReportConfig(run=str(finished / "evaluation"), out=str(tmp_path)))
    assert "training curves and data construction are left out" in page(tmp_path).text


def test_one_cell_alone_shows_its_answers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", num_questions=10, agents=1, retrievers=1)
    run(ReportConfig(run=str(folder)))
    found = page(folder)
    assert "Sample trajectories" in found.text and "wrong → right" not in found.text
    assert "Agent by retriever" not in found.text


def test_a_log_that_is_still_written_may_end_in_half_a_line(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    with (folder / "iteration-1" / "agent" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 41, "agent')
    run(ReportConfig(run=str(folder)), resume=True)
    costs = folder / "costs.jsonl"
    costs.write_text("{broken\n" + costs.read_text())
    with pytest.raises(RecordError, match=r"costs\.jsonl:1"):
        run(ReportConfig(run=str(folder)), resume=True)


@pytest.mark.parametrize(("make", "message"), [(False, "no such run folder"), (True, "nothing to report")])
def test_nothing_to_report_is_an_error(tmp_path: Path, make: bool, message: str) -> None:
    folder = tmp_path / "run"
    if make:
        folder.mkdir()
    with pytest.raises(RecordError, match=message):
        run(ReportConfig(run=str(folder)))
    assert not (folder / "report.html").exists()


def test_a_transcript_tells_the_environments_blocks_from_the_models_own() -> None:
    text = (
        "<think>a</think><information>made up</information><search> q </search>"
        "\n\n<information>Doc 1(Title: x) y</information>\n\nrubbish" + search_r1.correction + "<answer> z </answer>"
    )
    found = [(piece.kind, piece.text, piece.by_model) for piece in pieces(text, search_r1)]
    assert found == [
        ("think", "a", True),
        ("other", "<information>made up</information>", True),
        ("search", "q", True),
        ("information", "Doc 1(Title: x) y", False),
        ("other", "rubbish", True),
        ("correction", search_r1.correction.strip(), False),
        ("answer", "z", True),
    ]
    assert [piece.kind for piece in pieces("<think>cut", compact)] == ["think"]


def test_chromium_draws_the_page_without_errors_and_without_requests(finished: Path, tmp_path: Path) -> None:
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no Chromium on this machine")
    common = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    own = ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,2000"]
    shot = tmp_path / "report.png"
    done = subprocess.run(
        [*common, *own, f"--screenshot={shot}", (finished / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert shot.stat().st_size > 20_000, done.stderr
    assert "CONSOLE" not in done.stderr and "ERR_" not in done.stderr
