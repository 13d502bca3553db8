"""The report: self-contained, complete, tolerant of what is not there yet, and readable in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agentic_r_plugin.errors import OutputExistsError, RecordError
from agentic_r_plugin.evaluation.statistics import paired_difference
from agentic_r_plugin.report import results as report_results
from agentic_r_plugin.report.curves import cost_rows
from agentic_r_plugin.report.flips import read_answers
from agentic_r_plugin.report.report import ReportConfig, run
from agentic_r_plugin.report.run_folder import RunFolder, read_run
from agentic_r_plugin.store import read_json, write_json
from agentic_r_plugin.tags import compact, search_r1
from tests.evaluation.evaluation_run import HOSTILE, write_run

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


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two benchmarks, one of them the paper's, and names that are no loop's."""
    home = tmp_path_factory.mktemp("several") / "run"
    folder = write_run(
        home,
        num_questions=24,
        agents=["own", "other"],
        retrievers=["bm25", "e5"],
        benchmarks=["musique", "fictional_world"],
    )
    run(ReportConfig(run=str(folder)))
    return folder


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_asks_nothing_of_the_network(finished: Path) -> None:
    html, found = (finished / "report.html").read_text(encoding="utf-8"), page(finished)
    assert found.references and all(link.startswith("#") or link == "data:," for link in found.references)
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html
    script = html.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in html


def test_every_tag_is_closed_and_every_link_leads_somewhere(finished: Path) -> None:
    found = page(finished)
    assert found.open == []
    assert {link.removeprefix("#") for link in found.references if link.startswith("#")} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))


def test_the_page_holds_results_curves_and_costs(finished: Path) -> None:
    found, matrix = page(finished), json.loads((finished / "evaluation" / "matrix.json").read_text())
    best = max(matrix["cells"], key=lambda cell: cell["metrics"]["agentic_em"]["mean"])
    em = best["metrics"]["agentic_em"]
    assert f"{em['mean'] * 100:.1f} [{em['low'] * 100:.1f}, {em['high'] * 100:.1f}]" in found.text
    agent_curves, data_curves, retriever_curves, result_charts = 8, 2, 1, 3
    assert found.tags.count("svg") == agent_curves + data_curves + retriever_curves + result_charts
    for words in ("Training the retriever", "Held-out exact match", "Contrastive loss", "5 min 10 s", "61–80"):
        assert words in found.text, words
    assert "iteration 1, step 20: " in found.text and "iteration 2, turn of the query 2: 50 %" in found.text


def test_every_heading_of_a_table_says_what_it_heads(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert html.count("<th ") == html.count("<th scope=") > 50 and "<th>" not in html


def test_every_change_of_the_loop_is_compared_on_the_same_questions(finished: Path) -> None:
    folder = read_run(finished)
    effects = report_results.effects(folder, folder.cells)
    assert [(effect.group, effect.what, effect.change) for effect in effects[3:6]] == [
        ("iteration 2", "agent", "agent-1 → agent-2, with retriever-1"),
        ("iteration 2", "retriever", "retriever-1 → retriever-2, with agent-2"),
        ("iteration 2", "both", "agent-1 + retriever-1 → agent-2 + retriever-2"),
    ]
    assert [effect.group for effect in effects] == [*["iteration 1"] * 3, *["iteration 2"] * 3, *["first to last"] * 3]
    for effect in effects:
        before, after = (folder.outcomes(cell) for cell in (effect.before, effect.after))
        expected = paired_difference(
            [float(right) for right in before.values()], [float(right) for right in after.values()], resamples=500
        )
        assert effect.em is not None and effect.em["difference"] == pytest.approx(expected.difference)
        assert effect.em["low"] == pytest.approx(expected.low, abs=0.03)
        text = f"{expected.difference * 100:+.1f}".replace("-", "−")
        assert f"{text} [" in page(finished).text


def test_other_names_are_compared_with_the_first(several: Path) -> None:
    folder = read_run(several)
    cells = report_results.by_benchmark(folder.cells)["musique"]
    assert [(effect.group, effect.change) for effect in report_results.effects(folder, cells)] == [
        ("against bm25", "bm25 → e5, with own"),
        ("against bm25", "bm25 → e5, with other"),
        ("against own", "own → other, with bm25"),
        ("against own", "own → other, with e5"),
    ]


@pytest.mark.parametrize(
    ("agents", "retrievers", "groups"),
    [
        (["agent-1"], ["retriever-0", "retriever-1"], ["against retriever-0"]),
        (["agent-0", "agent-1", "agent-2"], ["retriever-0"], ["against agent-0"] * 2),
        ([f"agent-2-max-{n}" for n in (1, 2)], ["retriever-1", "retriever-2"], None),
        (["agent-0", "agent-1"], ["bm25-0", "bm25-1"], None),
    ],
)
def test_only_rounds_of_the_loop_are_iterations(
    tmp_path: Path, agents: list[str], retrievers: list[str], groups: list[str] | None
) -> None:
    folder = write_run(tmp_path / "run", num_questions=12, agents=agents, retrievers=retrievers)
    read = read_run(folder)
    found = report_results.effects(read, read.cells)
    expected = [f"against {retrievers[0]}"] * 2 + [f"against {agents[0]}"] * 2
    assert [effect.group for effect in found] == (expected if groups is None else groups)
    run(ReportConfig(run=str(folder)))
    assert "What every change gave" in page(folder).text and "comparisons of the evaluation" in page(folder).text
    assert "### What every change gave" in (folder / "report.md").read_text()


def test_comparisons_are_shown_where_no_change_stands_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_questions=12, agents=["a", "b"], retrievers=["x", "y", "z"])
    file = folder / "evaluation" / "matrix.json"
    matrix = json.loads(file.read_text())
    matrix["cells"] = [cell for cell in matrix["cells"] if (cell["agent"], cell["retriever"]) in CHOSEN]
    matrix["comparisons"] = [
        item
        for item in matrix["comparisons"]
        if all((item[side]["agent"], item[side]["retriever"]) in CHOSEN for side in ("first", "second"))
    ]
    file.write_text(json.dumps(matrix))
    read = read_run(folder)
    assert report_results.effects(read, read.cells) == []
    run(ReportConfig(run=str(folder)))
    found = page(folder)
    assert "All 2 comparisons of the evaluation" in found.text and "#effects" in found.references
    assert found.open == []


CHOSEN = {("a", "x"), ("b", "y"), ("b", "z")}


def test_the_papers_figures_are_next_to_ours_where_it_has_the_benchmark(several: Path, finished: Path) -> None:
    cells = json.loads((several / "evaluation" / "matrix.json").read_text())["cells"]
    table = report_results.overview(cells)
    assert table is not None and [head["name"] for head in table["heads"]] == ["musique", "fictional_world"]
    assert table["heads"][0]["note"] == "test, 24 questions; the paper: dev, 2,417"
    ours, theirs = table["rows"][:4], table["rows"][4:]
    assert [row["is_paper"] for row in table["rows"]] == [False] * 4 + [True] * 7
    assert (theirs[2]["agent"], theirs[2]["values"]) == ("Agentic-R", [{"em": 20.27, "searches": None}, None])
    assert theirs[2]["average"] is None
    assert ours[0]["average"] == pytest.approx(sum(value["em"] for value in ours[0]["values"]) / 2)
    assert "Agentic-R paper Agentic-R 20.27 –" in page(several).text
    assert "arXiv" not in page(finished).text


def test_the_questions_that_flip_are_carried_with_the_trajectories_of_every_cell(finished: Path) -> None:
    folder = read_run(finished)
    cells = folder.cells
    payload = read_answers(folder, num_trajectories=2000)
    [benchmark] = payload["benchmarks"]
    outcomes = [folder.outcomes(cell) for cell in cells]
    split = [key for key in outcomes[0] if len({cell[key] for cell in outcomes}) == 2]
    assert [question["id"] for question in benchmark["questions"]] == split and 0 < len(split) < 40
    better = sum(after and not before for before, after in zip(outcomes[0].values(), outcomes[8].values(), strict=True))
    assert benchmark["flips"][0][8] == better > 0
    record = next(record for record in folder.trajectories(cells[8]) if record.id == split[0])
    side = benchmark["questions"][0]["sides"][8]
    assert (side["right"], side["answer"], side["searches"]) == (bool(record.em), record.answer, len(record.turns))
    shown = [(kind, "\n".join(payload["lines"][place] for place in places)) for kind, *places in side["pieces"]]
    assert shown == [(piece.kind, piece.text) for piece in compact.pieces(record)]
    cells[8]["protocol_options"] = {"answer_tag": "final"}  # the cells are those of `folder`
    payload = read_answers(folder, num_trajectories=2000)
    pieces = payload["benchmarks"][0]["questions"][0]["sides"][8]["pieces"]
    assert [kind for kind, *_ in pieces] == [p.kind for p in replace(compact, answer_tag="final").pieces(record)]
    assert [kind for kind, *_ in pieces] != [kind for kind, _ in shown]


def test_the_page_carries_no_more_trajectories_than_asked_for(finished: Path, several: Path) -> None:
    [benchmark] = read_answers(read_run(finished), num_trajectories=50)["benchmarks"]
    assert len(benchmark["questions"]) == 50 // 9 and benchmark["flips"][0][8] > 5
    two = read_answers(read_run(several), num_trajectories=17)["benchmarks"]
    assert [len(benchmark["questions"]) for benchmark in two] == [2, 2]
    run(ReportConfig(run=str(finished), num_trajectories=0), resume=True)
    assert "Question by question" not in page(finished).text
    run(ReportConfig(run=str(finished)), resume=True)
    assert "Question by question" in page(finished).text


def test_several_seeds_together_show_each_seeds_figure(finished: Path, tmp_path: Path) -> None:
    matrix = json.loads((finished / "evaluation" / "matrix.json").read_text())
    for cell in matrix["cells"]:
        del cell["breakdown"], cell["by_turn"], cell["agent_fingerprint"], cell["search_fingerprint"]
        em = cell["metrics"]["agentic_em"]
        em["per_seed"] = [em["mean"] - 0.1, em["mean"] + 0.1]
    (tmp_path / "matrix.json").write_text(json.dumps(matrix | {"num_seeds": 2, "config": {"level": 0.9}}))
    run(ReportConfig(run=str(tmp_path)))
    text, em = page(tmp_path).text, matrix["cells"][0]["metrics"]["agentic_em"]["mean"]
    assert "90 % intervals over seeds and questions" in text and "seeds 2" in text
    assert f"{em * 100 - 10:.1f} · {em * 100 + 10:.1f}" in text
    assert "which questions flip is left out" in text and "Question by question" not in text


def test_what_differs_between_cells_is_shown_for_each(several: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(several, folder)
    file = folder / "evaluation" / "matrix.json"
    matrix = read_json(file)
    first, *others = matrix["cells"]
    agent, benchmark, retriever = first["agent"], first["benchmark"], first["retriever"]
    for cell in matrix["cells"]:
        if cell["agent"] == agent:
            cell["limits"] = cell["limits"] | {"max_searches": 10}
        if cell["benchmark"] == benchmark:
            cell["split"], cell["search_fingerprint"] = "dev", f"of {benchmark}"
            cell["breakdown"]["hops"]["2"]["num_questions"] = 7
    assert {cell["agent"] for cell in others} - {agent} and {cell["benchmark"] for cell in others} - {benchmark}
    write_json(file, matrix)
    run(ReportConfig(run=str(folder), out=str(tmp_path / "out")))
    text = (tmp_path / "out" / "report.md").read_text().partition("## Made from")[2]
    assert re.search(
        rf"protocol: differs: compact, 3 passages per search, at most 10 \({agent}\); .*at most 5 \(", text
    )
    assert re.search(rf"questions: differs: all of dev, seed 0 \({benchmark}\); all of test, seed 0 \(", text)
    assert f"{retriever} of {benchmark} ({benchmark}), fedcba9876543210 (" in text
    html = (tmp_path / "out" / "report.html").read_text()
    assert "hops 1<small>40 questions" in html and "hops 2</th>" in html and "searches, 7 questions" in html


def test_text_of_questions_and_passages_is_escaped(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "<b>Ada" not in html and HOSTILE not in html
    data = html.partition('id="questions-data">')[2].partition("</script>")[0]
    assert "<" not in data
    assert any(HOSTILE in line for line in json.loads(data)["lines"])
    assert "<b>Ada & Lom</b>" in json.loads(data)["benchmarks"][0]["questions"][0]["question"]


def test_the_markdown_holds_the_same_table(finished: Path) -> None:
    text = (finished / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Agentic-R: quickstart\n")
    assert "| fictional_world | agent-2 | retriever-2 | 40 " in text
    assert "| 2 | train-agent | 10 min 20 s | 1,280 | 2,900 | 91,000 |" in text


def test_the_markdown_names_the_headlines_benchmark_and_what_was_paid(several: Path, tmp_path: Path) -> None:
    assert "(bm25 → e5, with other, musique): EM" in (several / "report.md").read_text(encoding="utf-8")
    folder = tmp_path / "run"
    shutil.copytree(several, folder)
    with (folder / "costs.jsonl").open("a") as stream:
        stream.write('{"iteration": 1, "phase": "relevance", "seconds": 1.0, "usd": 2.5}\n')
    run(ReportConfig(run=str(folder)), resume=True)
    assert "in total, and 2.50 USD." in (folder / "report.md").read_text(encoding="utf-8")


def test_a_name_does_not_add_columns_to_a_markdown_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_questions=6, agents=["a|b", "c"], retrievers=["x"])
    run(ReportConfig(run=str(folder)))
    tables = [line for line in (folder / "report.md").read_text(encoding="utf-8").splitlines() if "a\\|b" in line]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in tables if line.startswith("|")] == [10, 6]


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
        ("iteration-1/data/data_report.json", None),
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


def test_questions_without_gold_answers_have_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_questions=10, agents=["a"], retrievers=["x", "y"])
    file = folder / "evaluation" / "matrix.json"
    matrix = read_json(file)
    for cell in matrix["cells"]:
        cell["metrics"]["agentic_em"] = {"mean": None}
    for item in matrix["comparisons"]:
        del item["metrics"]["agentic_em"]
    write_json(file, matrix)
    run(ReportConfig(run=str(folder)))
    assert "All 1 comparisons" in page(folder).text and page(folder).open == []
    assert 'class="best"' not in (folder / "report.html").read_text()


def test_without_a_value_to_draw_there_is_a_report(tmp_path: Path) -> None:
    """As of `evaluate metrics=[agentic_em,agentic_f1]` on questions without gold answers."""
    folder = write_run(tmp_path / "run", num_questions=10, agents=["a"], retrievers=["x"])
    file = folder / "evaluation" / "matrix.json"
    matrix = read_json(file)
    for cell in matrix["cells"]:
        cell["metrics"] = {name: {"mean": None} for name in ("agentic_em", "agentic_f1")}
        cell["by_turn"] = [{"turn": 1, "answer_recall_so_far": None}]
    write_json(file, matrix)
    run(ReportConfig(run=str(folder)))
    assert page(folder).open == [] and "Answer seen, turn by turn" not in page(folder).text


def test_the_note_on_answers_seen_is_there_if_any_benchmark_has_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_questions=10, agents=["a"], retrievers=["x"], benchmarks=["one", "two"])
    file = folder / "evaluation" / "matrix.json"
    matrix = read_json(file)
    matrix["cells"][0]["by_turn"] = []
    write_json(file, matrix)
    run(ReportConfig(run=str(folder)))
    assert "Answer seen, turn by turn: questions with" in page(folder).text


def test_one_cell_alone_shows_its_answers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", num_questions=10, agents=["agent-0"], retrievers=["retriever-0"])
    run(ReportConfig(run=str(folder)))
    found = page(folder)
    assert "Question by question" in found.text
    assert "Agent by retriever" not in found.text and "What every change gave" not in found.text
    [benchmark] = read_answers(read_run(folder), num_trajectories=100)["benchmarks"]
    assert len(benchmark["questions"]) == 10 and benchmark["first"] == [0, 0]
    [benchmark] = read_answers(read_run(folder), num_trajectories=4)["benchmarks"]
    [cell] = read_run(folder).cells
    assert len(benchmark["questions"]) == 4 and benchmark["asked"] == [10]
    assert benchmark["right"] == [round(10 * cell["metrics"]["agentic_em"]["mean"])]


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


def test_a_transcript_separates_the_environments_blocks_from_the_models_own() -> None:
    text = (
        "<think>a</think><information>made up</information><search> q </search>"
        "\n\n<information>Doc 1(Title: x) y</information>\n\nrubbish" + search_r1.correction + "<answer> z </answer>"
    )
    found = [(piece.kind, piece.text, piece.by_model) for piece in search_r1.split(text)]
    assert found == [
        ("think", "a", True),
        ("other", "<information>made up</information>", True),
        ("search", "q", True),
        ("information", "Doc 1(Title: x) y", False),
        ("other", "rubbish", True),
        ("correction", search_r1.correction.strip(), False),
        ("answer", "z", True),
    ]
    assert [piece.kind for piece in compact.split("<think>cut")] == ["think"]


def test_cached_tokens_that_no_server_reported_are_unknown_in_the_costs() -> None:
    reported = {"iteration": 1, "phase": "correctness", "prompt_tokens": 90, "cached_tokens": 30}
    unknown = {"iteration": 1, "phase": "trajectories", "prompt_tokens": 90, "cached_tokens": 0}
    unknown |= {"cache_unknown_tokens": 90, "prefix_hit_rate": None}
    none = {"iteration": 2, "phase": "trajectories", "prompt_tokens": 90, "cached_tokens": 0}
    rows, columns = cost_rows(RunFolder(path=Path("run"), costs=[reported, unknown, none]))
    assert columns == ["prompt_tokens", "cached_tokens"]
    assert [row.get("cached_tokens") for row in rows] == [30, None, 0]
