"""The evaluate command: a tiny real model, the real BM25 retriever, real files."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agentic_r_plugin.backends import LLMSpec, SearchSpec, open_llm, open_search
from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import (
    AgenticRError,
    ConfigError,
    JudgeError,
    ManifestMismatchError,
    OutputExistsError,
    RecordError,
    RequestRefusedError,
)
from agentic_r_plugin.evaluation import cell as cell_module
from agentic_r_plugin.evaluation import evaluate
from agentic_r_plugin.evaluation.answer_judge import AnswerJudge
from agentic_r_plugin.evaluation.cell import Cell, _intervals, run_cell
from agentic_r_plugin.evaluation.cells import cells_of, llm_spec, search_spec
from agentic_r_plugin.evaluation.evaluate import EvaluateConfig, run, write_matrix
from agentic_r_plugin.evaluation.matrix import csv_table, latex_table, write_tables
from agentic_r_plugin.evaluation.settings import AgenticRSettings, AnswerJudgeSettings
from agentic_r_plugin.records import Judgement, Trajectory
from agentic_r_plugin.report import report
from agentic_r_plugin.report.results import columns
from agentic_r_plugin.search.backends import BM25Backend
from agentic_r_plugin.storage.table import WorkTable
from agentic_r_plugin.store import read_json, read_records, write_json
from tests.evaluation.evaluation_toy import METRIC_NAMES, PEOPLE, RuleAgent, write_benchmark
from tests.llm.loopback import chat, serve
from tests.search.tiny_retriever import make_model, make_reranker
from tests.test_questions import write_form


@pytest.fixture(scope="module")
def tiny_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of a few thousand parameters with a byte-level tokenizer and an agent card."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

    folder = tmp_path_factory.mktemp("agent")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    set_seed(0)
    config = Qwen2Config(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=256,
        pad_token_id=256,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    limits = {"max_searches": 2, "max_malformed": 1, "max_tokens": 256, "max_response_tokens": 8}
    (folder / "agent.json").write_text(json.dumps({"protocol": "compact", "limits": limits, "topk": 2}))
    return folder


def config(tmp_path: Path, agent: Path, **extra: Any) -> EvaluateConfig:
    home = tmp_path / "toy"
    if not home.exists():
        write_benchmark(tmp_path)
    values = {
        "out": str(tmp_path / "out"),
        "data_dir": str(tmp_path),
        "benchmarks": ["toy"],
        "agents": {"tiny": str(agent)},
        "searches": {"bm25": f"bm25:{home / 'corpus.jsonl'}"},
        "resamples": 200,
        "settings": {"agent": {"device": "cpu"}},
    }
    return load_config(EvaluateConfig, values=values | extra)


def test_cells_in_separate_processes_come_out_as_those_of_one(tmp_path: Path, tiny_agent: Path) -> None:
    corpus = f"bm25:{tmp_path / 'toy' / 'corpus.jsonl'}"
    two = {"searches": {"bm25": corpus, "again": corpus}, "first": 3}
    run(config(tmp_path, tiny_agent, **two, out=str(tmp_path / "one")))
    run(config(tmp_path, tiny_agent, **two, processes=2))
    one, out = tmp_path / "one", tmp_path / "out"
    for name in ("tiny-bm25-toy", "tiny-again-toy"):
        assert (out / name / "per_question.jsonl").read_bytes() == (one / name / "per_question.jsonl").read_bytes()
    assert (out / "matrix.md").read_bytes() == (one / "matrix.md").read_bytes()
    with pytest.raises(ConfigError, match="toy"):
        run(config(tmp_path, tiny_agent, **two, out=str(tmp_path / "bad"), processes=2, split="nowhere"))


def test_the_command_writes_cells_and_matrix_with_all_they_were_made_from(
    tmp_path: Path, tiny_agent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(tmp_path, tiny_agent, first=4))
    matrix = read_json(tmp_path / "out" / "matrix.json")
    (cell,) = matrix["cells"]
    assert cell == read_json(tmp_path / "out" / "tiny-bm25-toy" / "result.json")
    assert (cell["num_questions"], cell["sample"], cell["seed"]) == (4, "first", 0)
    assert (cell["protocol"], cell["topk"], cell["limits"]["max_tokens"]) == ("compact", 2, 256)
    assert cell["stop_reasons"] == {"malformed": 4}
    em = cell["metrics"]["agentic_em"]
    assert em == {"mean": 0.0, "low": 0.0, "high": pytest.approx(0.49, abs=1e-3), "num_questions": 4}  # Wilson's
    assert cell["metrics"]["malformed_share"] == {"mean": 1.0}
    assert cell["cost"]["rollouts"] == 4 and cell["cost"]["generated_tokens"] == 4 * 2 * 8
    assert {"torch", "flashrag-dev", "agentic-r-plugin", "python"} <= set(matrix["versions"])
    assert matrix["hardware"]["cpus"] >= 1 and matrix["config"]["first"] == 4
    assert matrix["hardware"]["threads"] >= 1 and len(matrix["source_fingerprint"]) == 16 and matrix["command"]
    assert cell["by_turn"] == []
    table = (tmp_path / "out" / "matrix.md").read_text()
    assert "| toy       | tiny  | bm25      | 4         | 0.0 [0.0, 49.0] |" in table
    assert table in capsys.readouterr().out


def test_finished_cells_are_not_run_again_and_new_ones_are_added(
    tmp_path: Path, tiny_agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = config(tmp_path, tiny_agent)
    run(first)
    with pytest.raises(OutputExistsError, match="--resume"):
        run(first)
    result = tmp_path / "out" / "tiny-bm25-toy" / "result.json"
    before = result.stat().st_mtime_ns
    searches = dict.fromkeys(("bm25", "again"), first.searches["bm25"])
    run(config(tmp_path, tiny_agent, searches=searches), resume=True)
    assert result.stat().st_mtime_ns == before
    matrix = read_json(tmp_path / "out" / "matrix.json")
    assert [cell["retriever"] for cell in matrix["cells"]] == ["bm25", "again"]
    assert matrix["comparisons"][0]["metrics"]["agentic_em"]["p_value"] == 1.0
    monkeypatch.setattr(evaluate, "open_llm", None)
    run(config(tmp_path, tiny_agent, searches=searches), resume=True)


def test_a_cell_that_another_evaluation_has_finished_is_copied_if_all_it_was_made_from_is_the_same(
    tmp_path: Path, tiny_agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = config(tmp_path, tiny_agent, first=4)
    run(first)
    for corpus in ("same", "longer"):
        shutil.copytree(tmp_path / "toy", tmp_path / corpus)
    with (tmp_path / "longer" / "corpus.jsonl").open("a") as stream:
        stream.write('{"id": "new", "contents": "\\"A new title\\"\\nA new text."}\n')
    searches = {"bm25": f"bm25:{tmp_path / 'same' / 'corpus.jsonl'}"}
    manifest = Path(first.out, "tiny-bm25-toy", ".manifest.json")
    made = read_json(manifest)  # an index that was built at another time has other files
    write_json(manifest, made | {"made_from": made["made_from"] | {"retriever": "built at another time"}})
    asked: list[str] = []
    monkeypatch.setattr(cell_module, "run_cell", lambda *given: asked.append(given[0].name) or run_cell(*given))
    again = config(tmp_path, tiny_agent, first=4, searches=searches, out=str(tmp_path / "again"), reuse=[first.out])
    run(again)
    assert asked == []
    for name in ("result.json", "per_question.jsonl", "scores.json"):
        own, copied = (Path(out, "tiny-bm25-toy", name).read_bytes() for out in (first.out, again.out))
        assert own == copied
    assert (tmp_path / "again" / "matrix.md").read_bytes() == (tmp_path / "out" / "matrix.md").read_bytes()
    run(again, resume=True)
    others = {
        "passages": {"searches": {"bm25": f"bm25:{tmp_path / 'longer' / 'corpus.jsonl'}"}, "first": 4},
        "questions": {"first": 3},
        "settings": {"first": 4, "settings": {"agent": {"device": "cpu"}, "topk": 1}},
    }
    for name, changed in others.items():
        run(config(tmp_path, tiny_agent, out=str(tmp_path / name), reuse=[again.out, first.out], **changed))
    assert asked == ["tiny-bm25-toy"] * 3
    with pytest.raises(ConfigError, match="reuse: nowhere: no such folder"):
        run(config(tmp_path, tiny_agent, first=4, out=str(tmp_path / "x"), reuse=["nowhere"]))


def test_a_cell_keeps_what_it_was_made_by_and_the_matrix_shows_where_cells_differ(
    tmp_path: Path, tiny_agent: Path
) -> None:
    first = config(tmp_path, tiny_agent)
    run(first)
    file = tmp_path / "out" / "tiny-bm25-toy" / "result.json"
    cell, matrix = read_json(file), read_json(tmp_path / "out" / "matrix.json")
    assert matrix["provenance_differs"] == []
    assert all(matrix[part] == cell["provenance"][part] for part in ("versions", "hardware", "command"))
    elsewhere = {"hardware": cell["provenance"]["hardware"] | {"cpu": "Another"}, "source_fingerprint": "f" * 16}
    write_json(file, cell | {"provenance": cell["provenance"] | elsewhere})
    run(config(tmp_path, tiny_agent, searches=dict.fromkeys(("bm25", "again"), first.searches["bm25"])), resume=True)
    matrix = read_json(tmp_path / "out" / "matrix.json")
    assert matrix["provenance_differs"] == ["hardware", "source_fingerprint"]
    assert matrix["hardware"] is None is matrix["source_fingerprint"]
    assert matrix["versions"] == cell["provenance"]["versions"]
    report.run(report.ReportConfig(run=str(tmp_path / "out")))
    text = (tmp_path / "out" / "report.md").read_text().partition("## Made from")[2]
    own = cell["provenance"]["source_fingerprint"]
    assert f"- sources: differs: {'f' * 16} (tiny-bm25-toy); {own} (tiny-again-toy)" in text
    assert "- hardware: differs: Another" in text and "- versions: agentic-r-plugin" in text


def test_each_agent_runs_under_its_own_settings_and_each_benchmark_has_its_own_retriever(
    tmp_path: Path, tiny_agent: Path
) -> None:
    write_benchmark(tmp_path)
    write_benchmark(tmp_path / "other", num_questions=2)
    (tmp_path / "other" / "toy").rename(tmp_path / "toy2")
    values = {
        "benchmarks": ["toy", "toy2"],
        "agents": {"tiny": str(tiny_agent), "same": str(tiny_agent)},
        "per_agent": {
            "same": {
                "protocol": "r1_searcher",
                "protocol_options": {"passage_form": "{text}"},
                "topk": 1,
                "limits": {"max_tokens": 1200},
            }
        },
        "searches": {"bm25": f"bm25:{tmp_path}/{{benchmark}}/corpus.jsonl"},
    }
    run(config(tmp_path, tiny_agent, **values))
    cells = {(cell["agent"], cell["benchmark"]): cell for cell in read_json(tmp_path / "out" / "matrix.json")["cells"]}
    ours, theirs = cells["tiny", "toy"], cells["same", "toy"]
    assert (ours["protocol"], ours["topk"], ours["limits"]["max_tokens"]) == ("compact", 2, 256)
    assert (theirs["protocol"], theirs["topk"], theirs["limits"]["max_tokens"]) == ("r1_searcher", 1, 1200)
    assert theirs["protocol_options"] == {"passage_form": "{text}"} and "protocol_options" not in ours
    assert theirs["limits"]["max_malformed"] == ours["limits"]["max_malformed"] == 1
    assert [cells["tiny", name]["num_questions"] for name in ("toy", "toy2")] == [6, 2]
    evaluated = config(tmp_path, tiny_agent, **values)
    assert search_spec(evaluated, "bm25", "toy2").corpus == f"{tmp_path}/toy2/corpus.jsonl"


def test_csv_holds_every_metric_and_latex_the_papers_table() -> None:
    def cell(agent: str, retriever: str, benchmark: str, em: float) -> dict[str, Any]:
        metrics = {
            "agentic_em": {"mean": em, "low": em - 0.1, "high": em + 0.1, "num_questions": 50},
            "malformed_share": {"mean": 0.25},
        }
        names = {"agent": agent, "retriever": retriever, "benchmark": benchmark}
        return names | {"split": "test", "num_questions": 50, "metrics": metrics}

    results = [cell("own", "e5", "nq", 0.5), cell("own", "agentic_r", "nq", 0.625), cell("own", "e5", "popqa", 0.25)]
    lines = csv_table(results).splitlines()
    assert lines[0] == "benchmark,split,agent,retriever,metric,mean,low,high,num_questions"
    assert lines[1] == "nq,test,own,e5,agentic_em,0.5,0.4,0.6,50"
    assert lines[2] == "nq,test,own,e5,malformed_share,0.25,,,50" and len(lines) == 7
    assert latex_table(results).splitlines()[2:6] == [
        r"agent & retriever & nq & popqa & mean \\",
        r"\midrule",
        r"own & e5 & 50.00 {\scriptsize [40.0, 60.0]} & 25.00 {\scriptsize [15.0, 35.0]} & 37.50 \\",
        r"own & agentic\_r & \textbf{62.50} {\scriptsize [52.5, 72.5]} & -- & -- \\",
    ]
    assert "mean" not in latex_table(results[:2])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"first": 3}, "first"),
        ({"settings": {"limits": {"max_searches": 1}}}, "limits"),
        ({"settings": {"search": {"options": {"k1": 1.2}}}}, "search_options"),
        ({"settings": {"agent": {"device": "cpu", "dtype": "bfloat16"}}}, "dtype"),
        ({"resamples": 100}, "resamples"),
        ({"settings": {"agent": {"device": "cpu", "options": {"batch_wait_ms": 1}}}}, "agent_options"),
        ({"settings": {"agent": {"device": "cpu"}, "search": {"retriever": "another"}}}, "search_retriever"),
    ],
)
def test_a_cell_made_from_something_else_is_not_taken_for_this_one(
    tmp_path: Path, tiny_agent: Path, change: dict[str, Any], named: str
) -> None:
    run(config(tmp_path, tiny_agent))
    with pytest.raises(ManifestMismatchError, match=f"begun from something else: {named} was .*, now "):
        run(config(tmp_path, tiny_agent, **change), resume=True)


def test_a_finished_cell_of_which_nothing_says_what_it_was_made_from_is_refused(
    tmp_path: Path, tiny_agent: Path
) -> None:
    run(config(tmp_path, tiny_agent))
    (tmp_path / "out" / "tiny-bm25-toy" / ".manifest.json").unlink()
    with pytest.raises(ManifestMismatchError, match=r"tiny-bm25-toy is there without \.manifest\.json"):
        run(config(tmp_path, tiny_agent), resume=True)


def test_a_cell_begun_by_another_process_with_another_index_is_left_as_it_is(tmp_path: Path) -> None:
    output = rule_cell(tmp_path, "bm25").output(tmp_path / "out")
    with output.claim(resume=True) as held:
        held.begin({"search_fingerprint": "theirs"})
        with pytest.raises(OutputExistsError, match="another process is working on it"), output.claim(resume=True):
            pass
    with (
        output.claim(resume=True) as held,
        pytest.raises(ManifestMismatchError, match='search_fingerprint was "theirs", now "ours"'),
    ):
        held.begin({"search_fingerprint": "ours"})
    assert output.before() == {"search_fingerprint": "theirs"}


def test_a_cell_of_another_model_of_the_same_agent_is_not_taken_for_this_one(tmp_path: Path, tiny_agent: Path) -> None:
    run(config(tmp_path, tiny_agent))
    moved = tmp_path / "moved"
    shutil.copytree(tiny_agent, moved)
    run(config(tmp_path, tiny_agent, per_agent={"tiny": {"llm": {"model": str(moved)}}}), resume=True)
    (moved / "agent.json").write_text('{"protocol": "compact"}')
    with pytest.raises(ManifestMismatchError, match="begun from something else: agent was "):
        run(config(tmp_path, tiny_agent, per_agent={"tiny": {"llm": {"model": str(moved)}}}), resume=True)


def test_a_cell_of_an_earlier_version_is_refused_by_what_it_does_not_tell(tmp_path: Path, tiny_agent: Path) -> None:
    run(config(tmp_path, tiny_agent))
    file = tmp_path / "out" / "tiny-bm25-toy" / ".manifest.json"
    known = read_json(file)["made_from"]
    del known["agent_options"], known["search_retriever"]
    write_json(file, {"made_from": known})
    with pytest.raises(
        ManifestMismatchError, match=r"agent_options was absent, now {}; search_retriever was absent, now"
    ):
        run(config(tmp_path, tiny_agent), resume=True)


@contextmanager
def service(says: dict[str, str]) -> Iterator[int]:
    """A retrieval service that can only say who it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(says).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_finished_cell_is_kept_only_while_its_service_serves_the_same_index(
    tmp_path: Path, tiny_agent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says = {"status": "ok", "fingerprint": "first"}
    with service(says) as port:
        asked = config(tmp_path, tiny_agent, searches={"served": f"http://127.0.0.1:{port}"})
        run(asked)
        run(asked, resume=True)
        says["fingerprint"] = "second"
        with pytest.raises(ManifestMismatchError, match=r"tiny-served-toy: made with index first .* serves second now"):
            run(asked, resume=True)
    capsys.readouterr()
    run(asked, resume=True)
    assert f"cells of http://127.0.0.1:{port} are kept without asking" in capsys.readouterr().err


@pytest.mark.parametrize("of_earlier_version", [False, True])
def test_a_cell_goes_on_with_the_same_servers_at_other_addresses(
    tmp_path: Path, tiny_agent: Path, of_earlier_version: bool
) -> None:
    served = {"settings": {"agent": {"model": "agent", "tokenizer": str(tiny_agent)}}}
    out = tmp_path / "out" / "tiny-served-toy"

    def asked(port: int, agent: int, **settings: Any) -> EvaluateConfig:
        settings = served | {"searches": {"served": f"http://127.0.0.1:{port}"}} | settings
        return config(tmp_path, f"http://127.0.0.1:{agent}/v1", **settings)

    def cell(port: int, agent: int) -> Cell:
        (only,) = cells_of(asked(port, agent))
        return only

    with service({"status": "ok", "fingerprint": "first"}) as port, service({"fingerprint": "first"}) as other:
        first, moved = cell(port, 1), cell(other, 2)
        with first.output(tmp_path / "out").claim(resume=True) as held:
            held.begin({"agent_fingerprint": "agent", "search_fingerprint": "first"})
        if of_earlier_version:
            manifest = read_json(out / ".manifest.json")
            addresses = {"agent_url": "http://127.0.0.1:1/v1", "retriever": f"http://127.0.0.1:{port}"}
            manifest["made_from"] |= addresses
            write_json(out / ".manifest.json", manifest)
        with open_search(moved.settings.search) as search, moved.output(tmp_path / "out").claim(resume=True) as held:
            held.begin({"agent_fingerprint": "agent", "search_fingerprint": search.fingerprint()})
            assert held.finished is None
            with pytest.raises(ManifestMismatchError, match='search_fingerprint was "first", now "second"'):
                held.begin({"agent_fingerprint": "agent", "search_fingerprint": "second"})
    (local,) = cells_of(asked(0, 1, searches={"served": f"bm25:{tmp_path / 'toy' / 'corpus.jsonl'}"}))
    with pytest.raises(ManifestMismatchError, match=r"retriever was .*; search_backend was \"service\", now \"bm25\""):
        local.output(tmp_path / "out").finished()


def test_a_cell_in_work_may_change_its_scores_but_not_its_retriever(
    tmp_path: Path, tiny_agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config(tmp_path, tiny_agent))
    (tmp_path / "out" / "tiny-bm25-toy" / "result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(BM25Backend, "fingerprint", lambda _: "reloaded meanwhile")
        with pytest.raises(ManifestMismatchError, match="search_fingerprint was"):
            run(config(tmp_path, tiny_agent), resume=True)
    run(config(tmp_path, tiny_agent, metrics=["agentic_em", "agentic_f1", "EM"], resamples=100), resume=True)
    (cell,) = read_json(tmp_path / "out" / "matrix.json")["cells"]
    assert set(cell["metrics"]) == {"agentic_em", "agentic_f1", "em"}


def test_a_server_takes_no_options_of_another_engine() -> None:
    values = {
        "out": "x",
        "data_dir": "x",
        "benchmarks": ["toy"],
        "agents": {"served": "http://127.0.0.1:1/v1", "local": "folder"},
        "per_agent": {"served": {"llm": {"model": "agent", "options": {"requests_per_minute": 60}}}},
        "searches": {"bm25": "bm25:x"},
        "settings": {"agent": {"backend": "vllm", "options": {"gpu_memory_utilization": 0.6}}},
    }
    asked = load_config(EvaluateConfig, values=values)
    served, local = (llm_spec(asked, name) for name in ("served", "local"))
    assert (served.backend, served.model, served.options) == ("openai", "agent", {"requests_per_minute": 60})
    assert (local.backend, local.model, local.options) == ("vllm", "folder", {"gpu_memory_utilization": 0.6})


def test_an_interval_is_given_only_where_a_metric_is_the_mean_of_its_scores(tmp_path: Path) -> None:
    config, scores = rule_cell(tmp_path, "x").config, [0.0, 1.0, 1.0, None]
    table = _intervals(config, {"mean": 2 / 3, "corpus": 0.5, "none": None}, dict.fromkeys(("mean", "corpus"), scores))
    assert set(table["mean"]) > {"low", "high"} and table["mean"]["num_questions"] == 3
    assert table["corpus"] == {"mean": 0.5} and table["none"] == {"mean": None}


def test_exact_match_of_all_or_nothing_has_an_interval_with_a_width(tmp_path: Path) -> None:
    config = rule_cell(tmp_path, "x").config
    none, every = [0.0] * 20, [1.0] * 20
    table = _intervals(
        config, {"agentic_em": 0.0, "agentic_sub_em": 1.0}, {"agentic_em": none, "agentic_sub_em": every}
    )
    assert (table["agentic_em"]["low"], table["agentic_sub_em"]["high"]) == (0.0, 1.0)
    assert table["agentic_em"]["high"] == pytest.approx(0.161, abs=1e-3) == 1 - table["agentic_sub_em"]["low"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmarks": []}, "benchmarks: expected at least one"),
        ({"level": 95}, "level: expected a share between 0 and 1"),
        ({"resamples": 0}, "resamples: expected at least 1"),
        ({"first": 1, "random": 1}, "at most one of the two"),
        ({"first": -1}, "first: expected at least 1, found -1"),
        ({"random": 0}, "random: expected at least 1, found 0"),
        ({"searches": {"r0": None}}, "searches.r0: expected a location, found nothing"),
        ({"agents": {"q/5": "x"}}, "agents: 'q/5' names a folder"),
        ({"settings": {"temperature": -1}}, r"temperature: expected 0 \(greedy\) or above, found -1"),
        ({"agents": {"tiny": ""}}, "agents.tiny: expected a location, found nothing"),
        ({"agents": {"v1": {"5": "x"}}}, r"agents.v1: expected text, found {'5': 'x'}; a name with a dot is written"),
        ({"cells": ["tiny:bm52"]}, "'tiny:bm52' is not AGENT:SEARCH"),
        ({"split": "dev"}, "split 'dev'"),
        ({"agents": {"tiny": "nowhere"}}, "agents.tiny: no directory 'nowhere'"),
        ({"searches": {"r0": "nowhere"}}, "searches.r0: 'nowhere' does not exist"),
        ({"first": 99}, "99 questions were asked for"),
        ({"topk": 3}, "topk"),
        ({"per_agent": {"tyni": {}}}, "per_agent: 'tyni' is not among the agents tiny"),
        ({"per_agent": {"tiny": {"llm": {"modell": "x"}}}}, "modell"),
    ],
)
def test_what_cannot_work_is_an_error_that_leaves_nothing_behind(
    tmp_path: Path, tiny_agent: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config(tmp_path, tiny_agent, **change))
    assert not (tmp_path / "out").exists()


# --- One cell, with an agent that follows a rule ----------------------------------------------------------------------


def rule_cell(tmp_path: Path, name: str, **settings: Any) -> Cell:
    if not (tmp_path / "toy").exists():
        write_benchmark(tmp_path)
    config = EvaluateConfig(
        out="", data_dir=str(tmp_path), benchmarks=["toy"], agents={"rule": "x"}, searches={name: "x"},
        resamples=500, metrics=list(METRIC_NAMES),
    )  # fmt: skip
    return Cell(agent="rule", retriever=name, benchmark="toy", config=config, settings=AgenticRSettings(**settings))


def run_rule(tmp_path: Path, cell: Cell, agent: RuleAgent) -> dict[str, Any]:
    spec = SearchSpec(backend="bm25", corpus=str(tmp_path / "toy" / "corpus.jsonl"))
    with open_search(spec) as search, cell.output(tmp_path / "out").claim(resume=True) as held:
        held.begin({"agent_fingerprint": agent.fingerprint(), "search_fingerprint": search.fingerprint()})
        return run_cell(cell, agent, search, held)


def test_a_cell_holds_trajectories_scores_and_result(tmp_path: Path) -> None:
    cell = rule_cell(tmp_path, "bm25")
    result = run_rule(tmp_path, cell, RuleAgent())
    folder = tmp_path / "out" / "rule-bm25-toy"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".manifest.json",
        "per_question.jsonl",
        "result.json",
        "scores.json",
    ]
    records = list(read_records(folder / "per_question.jsonl", Trajectory))
    assert [record.answer for record in records] == ["Awe", "Bure", "Cam", "Dee", "Exe", "Fal"]
    assert read_json(folder / "scores.json")["search_turns"] == [2.0] * 6
    assert result["metrics"]["agentic_em"]["mean"] == 1.0
    assert result["cost"]["searches"] == 12


def test_recall_at_a_depth_that_is_switched_off_is_a_dash_in_every_table(tmp_path: Path) -> None:
    result = run_rule(tmp_path, rule_cell(tmp_path, "bm25", depth=0), RuleAgent())
    assert result["metrics"]["answer_recall_at_20"] == result["metrics"]["gold_document_recall_at_20"] == {"mean": None}
    assert "bm25,answer_recall_at_20,,,,6" in csv_table([result])
    assert not {"answer recall@20", "gold recall@20"} & {column.title for column in columns([result])}
    deep = run_rule(tmp_path, rule_cell(tmp_path, "deep"), RuleAgent())
    write_matrix(config(tmp_path, tmp_path), [result, deep], tmp_path / "out")
    report.run(report.ReportConfig(run=str(tmp_path / "out")))
    row = re.search(r"<tr.*?</tr>", (tmp_path / "out" / "report.html").read_text().partition("<tbody>")[2], re.DOTALL)
    assert row is not None and row[0].count(">–</td>") == 2


def test_an_interrupted_cell_goes_on_by_question_and_counts_its_cost_once(tmp_path: Path) -> None:
    whole = run_rule(tmp_path, rule_cell(tmp_path, "whole", batch_size=2), RuleAgent())
    cell = rule_cell(tmp_path, "cut", batch_size=2)
    with pytest.raises(_Killed):
        run_rule(tmp_path, cell, _DyingAgent(calls=7))
    with WorkTable(tmp_path / "out" / cell.name / ".work") as table:
        assert [row.key for row in table.rows()] == ["q0", "q1", "q2", "q3"]
    agent = RuleAgent()
    result = run_rule(tmp_path, cell, agent)
    assert agent.calls == 3
    assert {key: result["cost"][key] for key in ("rollouts", "searches", "generated_tokens")} == {
        key: whole["cost"][key] for key in ("rollouts", "searches", "generated_tokens")
    }
    assert result["metrics"] == whole["metrics"]
    for name in ("per_question.jsonl", "scores.json"):
        cut, uncut = (tmp_path / "out" / f"rule-{which}-toy" / name for which in ("cut", "whole"))
        assert cut.read_bytes() == uncut.read_bytes()


class _Killed(AgenticRError):
    pass


class _DyingAgent(RuleAgent):
    def __init__(self, *, calls: int) -> None:
        super().__init__()
        self.left = calls

    def generate(self, *args: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _Killed("out of power")
        return super().generate(*args)


def test_the_matrix_compares_cells_question_by_question(tmp_path: Path, tiny_agent: Path) -> None:
    good = run_rule(tmp_path, rule_cell(tmp_path, "good"), RuleAgent())
    silent = RuleAgent({(person, 0): "<answer> Nile </answer>" for person in PEOPLE})
    bad = run_rule(tmp_path, rule_cell(tmp_path, "bad"), silent)
    write_matrix(config(tmp_path, tiny_agent), [bad, good], tmp_path / "out")
    (comparison,) = read_json(tmp_path / "out" / "matrix.json")["comparisons"]
    assert (comparison["fixed"], comparison["first"]["retriever"], comparison["second"]["retriever"]) == (
        "agent",
        "bad",
        "good",
    )
    em = comparison["metrics"]["agentic_em"]
    assert (em["difference"], em["beyond_chance"], em["num_questions"]) == (1.0, True, 6)
    assert em["p_value"] == pytest.approx(2 / 64, abs=0.02)
    assert comparison["metrics"]["search_turns"]["difference"] == 2.0


class _RefusingAgent(RuleAgent):
    """Refuses the prompts that hold one of some words."""

    def __init__(self, *words: str) -> None:
        super().__init__()
        self.words = words

    def generate(self, requests: Any, sampling: Any) -> Any:
        prompts = [self.codec.decode(request.prompt_ids) for request in requests]
        if any(word in prompt for prompt in prompts for word in self.words):
            raise RequestRefusedError("the context is too short")
        return super().generate(requests, sampling)


def test_a_question_that_the_model_refuses_is_unanswered_and_the_cell_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cell = rule_cell(tmp_path, "refusing")
    with pytest.raises(RequestRefusedError, match=r"all of the 6 questions were refused; first, .*the context is too"):
        run_rule(tmp_path, cell, _RefusingAgent(""))
    capsys.readouterr()
    result = run_rule(tmp_path, cell, _RefusingAgent(PEOPLE[1]))
    records = list(read_records(tmp_path / "out" / cell.name / "per_question.jsonl", Trajectory))
    assert sorted((record.em, record.stop_reason.value) for record in records) == [
        (0, "max_tokens"), *[(1, "answered")] * 5
    ]  # fmt: skip
    assert result["refused"] == 1 and result["metrics"]["agentic_em"]["mean"] == pytest.approx(5 / 6)
    said = capsys.readouterr().err
    assert f"{cell.name}: 1 of 6 questions were refused and count as unanswered" in said


@pytest.mark.parametrize("name", ["test.json", "test.jsonl.gz", "test.parquet"])
def test_questions_are_checked_alike_in_every_form_and_a_text_is_one_answer(
    tmp_path: Path, tiny_agent: Path, name: str
) -> None:
    settings = config(tmp_path, tiny_agent)
    rows = [{"id": i, "question": f"Where is {i}?", "golden_answers": "Lindholm", "metadata": None} for i in range(2)]
    (tmp_path / "toy" / "test.jsonl").unlink()
    write_form(tmp_path / "toy" / name, rows)
    run(settings)
    records = list(read_records(tmp_path / "out" / "tiny-bm25-toy" / "per_question.jsonl", Trajectory))
    assert [(record.id, record.golden_answers) for record in records] == [("0", ("Lindholm",)), ("1", ("Lindholm",))]
    write_form(tmp_path / "toy" / name, [rows[0], rows[0]])
    with pytest.raises(RecordError, match=rf"{name}:2: question id '0' occurs twice"):
        run(config(tmp_path, tiny_agent, out=str(tmp_path / "other")))


@pytest.mark.parametrize("labels", [[None, ["x"]], [None, []]], ids=["one label", "no label"])
def test_unlabelled_questions_are_answered_and_left_out_of_the_scores(
    tmp_path: Path, tiny_agent: Path, labels: list, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, tiny_agent)
    rows = [
        {
            "id": str(i),
            "question": "Where?",
            "golden_answers": golden,
            "metadata": {"gold_doc_ids": "p0", "hops": i + 1},
        }
        for i, golden in enumerate(labels)
    ]
    write_form(tmp_path / "toy" / "test.jsonl", rows)
    run(settings)
    cell = read_json(tmp_path / "out" / "tiny-bm25-toy" / "result.json")
    labelled = sum(map(bool, labels))
    assert cell["num_questions"] == 2
    assert cell["metrics"]["agentic_em"]["mean"] == (0.0 if labelled else None)
    assert cell["metrics"]["agentic_em"].get("num_questions", 0) == labelled
    assert cell["metrics"]["gold_document_recall"]["mean"] == 0.0
    kinds = cell["breakdown"]["hops"]
    assert {value: (kind["num_questions"], kind["em"]) for value, kind in kinds.items()} == {
        "1": (1, None), "2": (1, 0.0 if labelled else None)
    }  # fmt: skip
    assert f"2 questions, {2 - labelled} of them without gold answers" in capsys.readouterr().out
    report.run(report.ReportConfig(run=str(tmp_path / "out")))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('<td data-value="">– <span class="ci">') == len(labels) - labelled


def test_a_search_with_a_reranker_is_a_retriever_of_the_matrix_with_its_own_name(
    tmp_path: Path, tiny_agent: Path
) -> None:
    reranker = make_reranker(tmp_path / "model")
    corpus = f"bm25:{tmp_path / 'toy' / 'corpus.jsonl'}"
    given = {"first": 3, "searches": {"bm25": corpus, "again": corpus}, "rerankers": {"ours": reranker}}
    asked = config(tmp_path, tiny_agent, **given, cells=["tiny:bm25", "tiny:bm25+ours"])
    assert list(asked.retrievers) == ["bm25", "bm25+ours", "again", "again+ours"]
    run(asked)
    matrix = read_json(tmp_path / "out" / "matrix.json")
    plain, reranked = matrix["cells"]
    assert (plain["retriever"], reranked["retriever"]) == ("bm25", "bm25+ours")
    assert plain["search_fingerprint"] != reranked["search_fingerprint"]
    assert "| bm25+ours |" in (tmp_path / "out" / "matrix.md").read_text()
    made = [
        read_json(tmp_path / "out" / f"tiny-{name}-toy" / ".manifest.json")["made_from"]
        for name in ("bm25", "bm25+ours")
    ]
    assert "rerank" not in made[0] and made[1]["rerank"]["depth"] == 50 and len(made[1]["rerank"]["model"]) == 16
    run(asked, resume=True)
    shutil.copytree(reranker, moved := tmp_path / "moved")
    run(config(tmp_path, tiny_agent, **given | {"rerankers": {"ours": str(moved)}}, cells=asked.cells), resume=True)
    (moved / "agentic_r.json").write_text('{"schema": "reranker/1", "formulation": "query", "max_length": 9}')
    with pytest.raises(ManifestMismatchError, match=r"tiny-bm25\+ours-toy.*rerank was"):
        run(config(tmp_path, tiny_agent, **given | {"rerankers": {"ours": str(moved)}}, cells=asked.cells), resume=True)
    with pytest.raises(ConfigError, match=r"settings\.search\.rerank: name the reranker"):
        config(tmp_path, tiny_agent, settings={"search": {"rerank": {"model": reranker}}})
    with pytest.raises(ConfigError, match=r"'tiny:bm25\+theirs' is not AGENT:SEARCH"):
        config(tmp_path, tiny_agent, **given, cells=["tiny:bm25+theirs"])
    # A retriever in its place is refused before the first cell is evaluated.
    wrong = given | {"rerankers": {"ours": make_model(tmp_path / "retriever")}, "out": str(tmp_path / "wrong")}
    with pytest.raises(ConfigError, match=r"searches\.bm25\+ours: reranker: .* is no cross-encoder"):
        run(config(tmp_path, tiny_agent, **wrong))
    assert not (tmp_path / "wrong").exists()


# --- Hybrids and the judge --------------------------------------------------------------------------------------------


def test_a_hybrid_of_two_searches_is_a_retriever_of_the_matrix_and_covers_both_corpora(
    tmp_path: Path, tiny_agent: Path
) -> None:
    write_benchmark(tmp_path)
    other = shutil.copy(tmp_path / "toy" / "corpus.jsonl", tmp_path / "other.jsonl")
    searches: dict[str, Any] = {
        "bm25": "bm25:" + str(tmp_path / "{benchmark}" / "corpus.jsonl"),
        "own": {"backend": "bm25", "corpus": str(other), "options": {"b": 0.1}},
        "both": "hybrid:bm25+own",
        "deep": {"backend": "hybrid", "options": {"k": 5, "parts": ["own", {"backend": "bm25", "corpus": str(other)}]}},
    }
    given = config(tmp_path, tiny_agent, searches=searches, first=2, cells=["tiny:both", "tiny:deep"])
    run(given)
    table = (tmp_path / "out" / "matrix.md").read_text()
    assert "| toy       | tiny  | both      |" in table and "| toy       | tiny  | deep      |" in table
    cell = read_json(tmp_path / "out" / "tiny-both-toy" / "result.json")
    assert cell["made_from"]["search_backend"] == "hybrid" and len(cell["made_from"]["retriever"]) == 2
    run(given, resume=True)
    with Path(other).open("a") as stream:
        stream.write('{"id": "new", "contents": "A new river."}\n')
    with pytest.raises(ManifestMismatchError, match="retriever was"):
        run(given, resume=True)


def test_the_reranker_of_a_part_of_a_hybrid_is_known_by_its_contents(tmp_path: Path, tiny_agent: Path) -> None:
    corpus = str(write_benchmark(tmp_path) / "corpus.jsonl")
    reranker = make_reranker(tmp_path / "part")
    searches = {
        "bm25": f"bm25:{corpus}",
        "ranked": {"backend": "bm25", "corpus": corpus, "rerank": {"model": reranker, "depth": 5}},
        "both": "hybrid:bm25+ranked",
    }
    given = config(tmp_path, tiny_agent, searches=searches, first=2, cells=["tiny:both"])
    run(given)
    run(given, resume=True)
    shutil.rmtree(reranker)
    shutil.copytree(make_reranker(tmp_path / "other", seed=1), reranker)
    with pytest.raises(ManifestMismatchError, match="part_rerankers was"):
        run(given, resume=True)


@pytest.mark.parametrize(
    ("searches", "message"),
    [
        ({"a": "hybrid:b+c", "b": "bm25:x"}, r"searches.a: expected parts among the other searches \(b\), found 'c'"),
        ({"a": "hybrid:a+b", "b": "bm25:x"}, "found 'a'"),
        ({"a": "hybrid:b+c", "b": "bm25:x", "c": "hybrid:b+b"}, "its part 'c' is a hybrid itself"),
        ({"a": "hybrid:b+c", "b": "bm25:CORPUS", "c": "no-index"}, "searches.a: 'no-index' does not exist"),
        ({"a": {"backend": "bm25", "korpus": "x"}}, "korpus"),
    ],
)
def test_a_hybrid_of_unknown_searches_is_an_error(
    tmp_path: Path, tiny_agent: Path, searches: dict[str, Any], message: str
) -> None:
    corpus = write_benchmark(tmp_path) / "corpus.jsonl"
    given = {k: v.replace("CORPUS", str(corpus)) if isinstance(v, str) else v for k, v in searches.items()}
    with pytest.raises(ConfigError, match=message):
        run(config(tmp_path, tiny_agent, searches=given, cells=["tiny:a"]))


def verdict(prompt: str) -> str:
    """Finds rivers in `RIGHT` correct, in three ways to say so; never decides about `Exe`."""
    answer = re.search(r"^Answer to check: (.*)$", prompt, re.MULTILINE)
    assert answer is not None
    name = answer[1].removeprefix("River ")
    if name == "Exe":
        return "I cannot say."
    wanted = re.search(r"^Correct answers \(.*\): (.*)$", prompt, re.MULTILINE)
    assert wanted is not None
    right = name == wanted[1]
    return {"Awe": "Yes.", "Bure": f'```json\n{{"reason": "r", "correct": {str(right).lower()}}}\n```'}.get(
        name, f'<think>{{"correct": false}}</think>{{"reason": "same river", "correct": {str(right).lower()}}}'
    )


def run_judged(
    tmp_path: Path, name: str, agent: RuleAgent, answer: Any = verdict, **judging: Any
) -> tuple[dict[str, Any], list[str]]:
    """The cell's result, and the prompts that the judge was sent."""
    cell = rule_cell(tmp_path, name)
    spec = SearchSpec(backend="bm25", corpus=str(tmp_path / "toy" / "corpus.jsonl"))
    with serve(lambda path, body: chat(answer(body["messages"][0]["content"]))) as server, open_search(spec) as search:
        llm = LLMSpec(backend="openai", url=server.url, model="judge", concurrency=1)
        settings = AnswerJudgeSettings(llm=llm, **{"max_error_share": 0.2, "max_retries": 1, **judging})
        cell = replace(cell, config=replace(cell.config, judge=settings))
        try:
            with open_llm(llm) as backend, cell.output(tmp_path / "out").claim(resume=True) as held:
                held.begin({"agent_fingerprint": agent.fingerprint(), "search_fingerprint": search.fingerprint()})
                result = run_cell(cell, agent, search, held, AnswerJudge(backend, settings))  # type: ignore[arg-type]
        finally:
            asked = [body["messages"][0]["content"] for _, body, _ in server.requests]
    return result, asked


REPLIES = {("Bo Rusk", 2): "<answer> River Bure </answer>", ("Cy Venn", 0): "<answer> Nile </answer>",
           ("Di Marsh", 0): "no answer, no search", ("Di Marsh", 1): "none", ("Di Marsh", 2): "none"}  # fmt: skip


def test_the_judge_scores_answers_next_to_exact_match_and_its_errors_are_counted_apart(tmp_path: Path) -> None:
    result, asked = run_judged(tmp_path, "judged", RuleAgent(REPLIES))
    scores = read_json(tmp_path / "out" / "rule-judged-toy" / "scores.json")
    assert scores["agentic_em"] == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert scores["agentic_judge"] == [1.0, 1.0, 0.0, 0.0, None, 1.0]
    assert result["metrics"]["agentic_judge"]["mean"] == pytest.approx(0.6)
    assert result["metrics"]["agentic_judge"]["num_questions"] == 5
    assert result["judge"]["failed"] == 1 and "I cannot say." in result["judge"]["first_error"]
    assert len(asked) == 6 and result["cost"]["judge_requests"] == 6  # 4 answers and one of them again; none for `Di`
    records = list(read_records(tmp_path / "out" / "rule-judged-toy" / "judgements.jsonl", Judgement))
    assert [record.correct for record in records] == [True, True, False, False, None, True]
    assert (records[5].reason, records[3].answer, records[4].error is None) == ("same river", None, False)
    plain = run_rule(tmp_path, rule_cell(tmp_path, "plain"), RuleAgent(REPLIES))
    table = write_tables([result, plain], tmp_path)
    assert "| EM " in table and "| judge " in table and re.search(r"judged .*\| 60\.0 \[", table)
    assert "judge" not in write_tables([plain], tmp_path) and "judge" not in plain
    plain_file, judged_file = (tmp_path / "out" / f"rule-{n}-toy" / "per_question.jsonl" for n in ("plain", "judged"))
    assert plain_file.read_bytes() == judged_file.read_bytes()


def test_a_resume_asks_the_judge_only_for_what_is_missing(tmp_path: Path) -> None:
    def broken(prompt: str) -> str:
        return "?" if "Answer to check: Cam" in prompt or "Answer to check: Exe" in prompt else "yes"

    with pytest.raises(JudgeError, match=r"2 of 6 judgements failed, more than judge.max_error_share=0.2; first, q2"):
        run_judged(tmp_path, "cut", RuleAgent(), broken)
    agent = RuleAgent()
    result, asked = run_judged(tmp_path, "cut", agent, lambda prompt: '{"correct": false}')
    assert agent.calls == 0 and len(asked) == 2 and all("Cam" in text or "Exe" in text for text in asked)
    assert result["metrics"]["agentic_judge"]["mean"] == pytest.approx(4 / 6) and result["judge"]["failed"] == 0
    assert result["cost"]["judge_requests"] == 10  # 6 and the 2 failed ones again, then 2


def test_the_command_opens_the_judge_and_compares_it_on_resume(tmp_path: Path, tiny_agent: Path) -> None:
    with pytest.raises(ConfigError, match=r"agentic_judge needs a judge; set judge\.llm\.model"):
        config(tmp_path, tiny_agent, metrics=["agentic_em", "agentic_f1", "agentic_judge"])
    with serve(lambda *_: chat("yes")) as server:
        llm = {"backend": "openai", "url": server.url, "model": "judge"}
        given = config(tmp_path, tiny_agent, first=2, judge={"llm": llm})
        assert given.metrics[-1] == "agentic_judge"
        run(given)
        cell = read_json(tmp_path / "out" / "tiny-bm25-toy" / "result.json")
        assert cell["metrics"]["agentic_judge"]["mean"] == 0.0 and not server.requests  # no answers, so none to judge
        assert cell["made_from"]["judge"]["model"] == "judge"
        run(config(tmp_path, tiny_agent, first=2, judge={"llm": llm | {"concurrency": 2}}), resume=True)
        for change in ({"llm": llm | {"model": "other"}}, {"llm": llm, "max_tokens": 5}):
            with pytest.raises(ManifestMismatchError, match="judge was"):
                run(config(tmp_path, tiny_agent, first=2, judge=change), resume=True)
