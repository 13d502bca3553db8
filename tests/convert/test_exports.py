"""`agentic-r convert groups`, `runs` and `qrels`: read again by the libraries that they are written for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from agentic_r_plugin import cli
from agentic_r_plugin.convert.trajectories import trajectory
from agentic_r_plugin.records import Candidates, Group, Passage, Question, Relevance, ScoredPassage, Trajectory
from agentic_r_plugin.store import read_records, write_records
from tests.search.tiny_retriever import make_model

PASSAGES = [Passage(id=str(number), title=f"T{number}", text=f"Text {number}.") for number in range(6)]
MINILM = ["retriever=builtin:minilm", "--query-prompt", "query: ", "--passage-prompt", "passage: "]


def convert(*arguments):
    assert cli.main(["convert", *map(str, arguments)]) == 0


@pytest.fixture
def groups(tmp_path) -> tuple[Path, Path]:
    """(groups, corpus): the second group has one negative more."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in PASSAGES))
    made = [
        Group(id="q1", turn=1, question="Q?", query="first", history=(), positive="0", negatives=("1", "2")),
        Group(
            id="q1", turn=2, question="Q?", query="next", history=("first",), positive="3", negatives=("4", "5", "1")
        ),
    ]
    write_records(tmp_path / "groups.jsonl", made)
    return tmp_path / "groups.jsonl", corpus


def exported(groups, to: str, tmp_path: Path):
    """Rows of a data set as `datasets` loads it, and its card."""
    from datasets import load_dataset

    out = tmp_path / to
    convert("groups", f"in={groups[0]}", f"corpus={groups[1]}", f"out={out}", f"to={to}", *MINILM)
    rows = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    return rows, (out / "README.md").read_text()


def test_groups_for_tevatron_and_flagembedding_leave_the_prefixes_to_the_trainer(groups, tmp_path):
    rows, card = exported(groups, "tevatron", tmp_path)
    assert [row["query_id"] for row in rows] == ["q1/1", "q1/2"] and rows[1]["query"] == "Q? [SEP] next"
    assert rows[0]["positive_passages"] == [{"docid": "0", "title": "T0", "text": "Text 0."}]
    assert [[item["docid"] for item in row["negative_passages"]] for row in rows] == [["1", "2"], ["4", "5", "1"]]
    assert '--query_prefix "query: " --passage_prefix "passage: " --train_group_size 4' in card
    rows, card = exported(groups, "flagembedding", tmp_path)
    assert rows[0] == {"query": "Q? [SEP] first", "pos": ['"T0"\nText 0.'], "neg": ['"T1"\nText 1.', '"T2"\nText 2.']}
    assert '--query_instruction_for_retrieval "query: "' in card


def test_queries_hold_the_reasoning_that_the_formulation_reads(groups, tmp_path):
    file, corpus = groups
    made = [replace(group, reasoning="Who?") for group in read_records(file, Group)]
    write_records(file, made)
    out = tmp_path / "set"
    convert(
        "groups", f"in={file}", f"corpus={corpus}", f"out={out}", "to=tevatron", "formulation=reasoning_query", *MINILM
    )
    first, _ = (json.loads(line) for line in (out / "train.jsonl").read_text().splitlines())
    assert first["query"] == "Reasoning: Who?\n\nQuery: first"


def test_sentence_transformers_trains_on_the_exported_set(groups, tmp_path):
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    from agentic_r_plugin.search.encoder import resolve

    rows, card = exported(groups, "sentence_transformers", tmp_path)
    assert (
        rows.column_names == ["anchor", "positive", "negative_1", "negative_2"] and "do not set its `prompts`" in card
    )
    assert rows[1]["anchor"] == "query: Q? [SEP] next" and rows[1]["negative_2"] == 'passage: "T5"\nText 5.'
    model = SentenceTransformer(str(resolve("builtin:minilm")), device="cpu")
    before = model.encode(["Q?"])
    arguments = Arguments(output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, use_cpu=True,
                          report_to=[], save_strategy="no", learning_rate=1e-3)  # fmt: skip
    loss = MultipleNegativesRankingLoss(model)
    trained = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss).train()
    assert trained.global_step == 1 and trained.training_loss > 0 and (model.encode(["Q?"]) != before).any()


def test_a_passage_that_the_corpus_lacks_is_named_with_its_line(groups, tmp_path, capsys):
    groups[0].write_text(groups[0].read_text().replace('"5"', '"9"'))
    given = ["convert", "groups", f"in={groups[0]}", f"corpus={groups[1]}", f"out={tmp_path / 'o'}", "to=tevatron"]
    assert cli.main([*given, *MINILM]) == 1
    assert f"{groups[0]}:2: " in capsys.readouterr().err


def test_without_a_network_the_local_files_are_whole_and_the_token_is_not_shown(groups, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_secret_value")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:1")
    out = tmp_path / "set"
    given = ["convert", "groups", f"in={groups[0]}", f"corpus={groups[1]}", f"out={out}", "to=tevatron", *MINILM]
    assert cli.main([*given, "push_to_hub=me/set", "token_env=MY_TOKEN"]) == 1
    said = capsys.readouterr().err
    assert "push_to_hub=me/set" in said and "--resume only uploads" in said and "hf_secret" not in said
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == ["README.md", "train.jsonl"]
    assert not any("hf_secret" in path.read_text() for path in out.iterdir())
    assert cli.main([*given, "--resume"]) == 0


@pytest.fixture
def searched(tmp_path) -> Path:
    question = Question(id="q1", question="Q?", golden_answers=("yes",))
    shown = [("Hm.", "first", [PASSAGES[2], PASSAGES[0]]), ("", "next", [PASSAGES[0], PASSAGES[3]])]
    unanswered = trajectory(Question(id="q2", question="R?", golden_answers=("no",)), [("", "x", [PASSAGES[5]])], None)
    write_records(tmp_path / "t.jsonl", [trajectory(question, shown, "yes", reasoning="Seen."), unanswered])
    return tmp_path / "t.jsonl"


def evaluate(qrels: Path, run: Path) -> dict[str, dict[str, float]]:
    """Reciprocal rank and recall per query: by pytrec_eval where it is installed, else by this reader of the form."""
    read = {"qrels": {}, "run": {}}
    for line in qrels.read_text().splitlines():
        query, zero, passage, relevance = line.split()
        read["qrels"].setdefault(query, {})[passage] = int(relevance)
        assert zero == "0"
    for line in run.read_text().splitlines():
        query, constant, passage, rank, score, _ = line.split()
        read["run"].setdefault(query, {})[passage] = float(score)
        assert constant == "Q0" and len(read["run"][query]) == int(rank)
    try:
        import pytrec_eval
    except ImportError:
        found = {}
        for query, scores in read["run"].items():
            ranked = sorted(scores, key=scores.get, reverse=True)
            first = next((rank for rank, p in enumerate(ranked, 1) if read["qrels"].get(query, {}).get(p)), 0)
            found[query] = {"recip_rank": 1 / first if first else 0.0}
        return found
    return pytrec_eval.RelevanceEvaluator(read["qrels"], {"recip_rank"}).evaluate(read["run"])


def test_trec_files_of_trajectories_and_of_candidates(searched, tmp_path):
    questions = tmp_path / "questions.jsonl"
    gold = [("q1", ["0"]), ("q2", ["1", "5"])]
    questions.write_text("".join(
        json.dumps({"id": name, "question": "?", "golden_answers": ["x"], "metadata": {"gold_doc_ids": ids}}) + "\n"
        for name, ids in gold
    ))  # fmt: skip
    convert("runs", f"in={searched}", f"out={tmp_path / 'run.trec'}", "tag=mine")
    convert("qrels", f"in={questions}", f"out={tmp_path / 'qrels.trec'}")
    assert (tmp_path / "run.trec").read_text().splitlines() == [
        "q1 Q0 2 1 1.0 mine", "q1 Q0 0 2 0.5 mine", "q1 Q0 3 3 0.3333333333333333 mine", "q2 Q0 5 1 1.0 mine"
    ]  # fmt: skip
    assert (tmp_path / "qrels.trec").read_text().splitlines() == ["q1 0 0 1", "q2 0 1 1", "q2 0 5 1"]
    found = evaluate(tmp_path / "qrels.trec", tmp_path / "run.trec")
    assert {query: value["recip_rank"] for query, value in found.items()} == {"q1": 0.5, "q2": 1.0}

    passages = tuple(ScoredPassage(id=name, score=score) for name, score in (("3", 0.9), ("4", 0.7)))
    query = Candidates(id="q1", turn=2, question="Q?", golden_answers=("yes",), query="next", history=(), prefix="",
                       passages=passages)  # fmt: skip
    write_records(tmp_path / "c.jsonl", [query])
    write_records(tmp_path / "r.jsonl", [Relevance(id="q1", turn=2, scores={"3": 0, "4": 80})])
    convert("runs", f"in={tmp_path / 'c.jsonl'}", f"out={tmp_path / 'c.trec'}")
    convert("qrels", f"in={tmp_path / 'r.jsonl'}", f"out={tmp_path / 'r.trec'}")
    assert (tmp_path / "c.trec").read_text() == "q1/2 Q0 3 1 0.9 agentic-r\nq1/2 Q0 4 2 0.7 agentic-r\n"
    assert evaluate(tmp_path / "r.trec", tmp_path / "c.trec")["q1/2"]["recip_rank"] == 0.5


def test_run_files_of_browsecomp_plus_are_read_again_as_the_same_trajectories(groups, searched, tmp_path):
    convert("runs", f"in={searched}", f"out={tmp_path / 'runs'}", "to=browsecomp_plus", "tag=model")
    files = sorted(path.name for path in (tmp_path / "runs").glob("run_*.json"))
    assert files == ["run_000001.json", "run_000002.json"]
    first, second = (json.loads((tmp_path / "runs" / name).read_text()) for name in files)
    assert (first["query_id"], first["status"], first["tool_call_counts"]) == ("q1", "completed", {"search": 2})
    assert first["retrieved_docids"] == ["2", "0", "3"] and second["status"] == "incomplete"
    assert first["result"][-1] == {"type": "output_text", "tool_name": None, "arguments": None, "output": "yes"}
    questions = tmp_path / "questions.jsonl"
    rows = [
        {"id": "q1", "question": "Q?", "golden_answers": ["yes"]},
        {"id": "q2", "question": "R?", "golden_answers": ["no"]},
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "again.jsonl"
    convert("trajectories", f"in={tmp_path / 'runs'}", f"out={out}", f"corpus={groups[1]}", f"questions={questions}")
    assert list(read_records(out, Trajectory)) == list(read_records(searched, Trajectory))


def test_the_last_thought_of_an_agent_that_calls_tools_is_of_its_last_turn_alone(searched, tmp_path):
    call = '<think>First.</think><tool_call>{"name": "search", "arguments": {"query": "next"}}</tool_call>'
    shown, last = "<tool_response>Doc 1 \u2026</tool_response>", "<think>Second.</think>So <answer>yes</answer>"
    record = next(iter(read_records(searched, Trajectory)))
    turn = replace(record.turns[0], reasoning="First.", end=len(call))
    runs = tuple(map(len, (call, shown, last)))
    write_records(tmp_path / "t.jsonl", [replace(record, turns=(turn,), text=call + shown + last, runs=runs)])
    convert("runs", f"in={tmp_path / 't.jsonl'}", f"out={tmp_path / 'runs'}", "to=browsecomp_plus")
    made = json.loads((tmp_path / "runs" / "run_000001.json").read_text())
    assert [item["output"] for item in made["result"] if item["type"] == "reasoning"] == [["First."], ["Second."]]
    assert made["result"][-1]["output"] == "yes"


@pytest.mark.parametrize("to", ["tevatron", "flagembedding", "sentence_transformers"])
def test_weights_of_groups_are_kept_and_it_is_said_what_the_trainer_does_with_them(groups, to, tmp_path, caplog):
    first, second = read_records(groups[0], Group)
    write_records(groups[0], [replace(first, weight=0.25), second])
    rows, card = exported(groups, to, tmp_path)
    field = "label" if to == "sentence_transformers" else "weight"
    assert rows[field] == [0.25, 1.0]
    assert (
        f"1 of the groups have a weight other than 1, in the field `{field}`" in card
        and card.split("\n\n")[-1].strip() in caplog.text
    )
    assert json.loads((tmp_path / to / ".report.json").read_text())["weighted"] == 1


def test_a_loss_of_sentence_transformers_gets_the_weights_as_labels(groups, tmp_path):
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    first, second = read_records(groups[0], Group)
    write_records(groups[0], [replace(first, weight=0.25), second])
    rows, _ = exported(groups, "sentence_transformers", tmp_path)
    seen = []

    class Loss(MultipleNegativesRankingLoss):
        def forward(self, features, labels):
            seen.append((len(list(features)), labels.tolist()))
            return super().forward(features, labels)

    model = SentenceTransformer(make_model(tmp_path / "tiny"), device="cpu")
    arguments = Arguments(output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, use_cpu=True,
                          report_to=[], save_strategy="no")  # fmt: skip
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=Loss(model)).train()
    ((columns, labels),) = seen
    assert columns == 4 and sorted(labels) == [0.25, 1.0]


def test_qrels_of_questions_whose_columns_are_named(tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"key": 1, "asked": "Q?", "docs": [{"docid": 3}, {"docid": "4"}]}\n')
    given = ["format=question=asked,id=key,gold_doc_ids=docs.docid", f"out={tmp_path / 'q.trec'}"]
    convert("qrels", f"in={questions}", *given)
    assert (tmp_path / "q.trec").read_text() == "1 0 3 1\n1 0 4 1\n"
