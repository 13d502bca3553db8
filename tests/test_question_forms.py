"""Every form of questions through every command that reads questions: the same questions, each with its own id."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from agentic_r_plugin import cli
from agentic_r_plugin.agent.prepare import training_questions
from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.config import load_config
from agentic_r_plugin.data.trajectories import TrajectoriesConfig, chosen_questions
from agentic_r_plugin.errors import AgenticRError, ConfigError, RecordError
from agentic_r_plugin.forms import question_form
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Question, Trajectory
from agentic_r_plugin.store import read_records


@dataclass
class Form:
    """Rows as their project writes them, and the questions that they are."""

    rows: list[dict[str, Any]]
    ids: tuple[str, str]
    format: str = ""
    name: str = "q.jsonl"
    answers: tuple[tuple[str, ...], ...] = (("Oslo", "Kristiania"), ("Ås",))
    metadata: dict[str, Any] | None = None
    """Of the first question."""


QUESTIONS = ("Where was Ann\u2028born?", "Where did Bob die?")
FACTS = [["Ann", 0], ["Ann", 1], ["Oslo", 0]]
EVIDENCES = [["Ann", "mother", "Eva"], ["Eva", "born in", "Oslo"]]
OF_2WIKI = {"supporting_titles": ["Ann", "Oslo"], "hop_answers": ["Eva", "Oslo"], "type": "bridge"}
HUB_FACTS = {"title": ["Ann", "Oslo"], "sent_id": [0, 0]}
HOPS = [{"question": "Ann >> mother", "answer": "Eva"}, {"question": "#1 >> born", "answer": "Oslo"}]


def verl(number: int, **more: Any) -> dict[str, Any]:
    """A row of Search-R1's Parquet: two data sets, each numbered from 0."""
    return {
        "data_source": ("nq", "hotpotqa")[number],
        "prompt": [{"role": "user", "content": f"Answer. Question: {QUESTIONS[number]}\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": [["Oslo", "Kristiania"], ["Ås"]][number]}},
        "extra_info": {"split": "train", "index": 0},
    } | more


def rows(first: dict[str, Any], second: dict[str, Any], question: str = "question") -> list[dict[str, Any]]:
    return [{question: QUESTIONS[0]} | first, {question: QUESTIONS[1]} | second]


FORMS = {
    "FlashRAG": Form(
        rows({"id": "a", "golden_answers": ["Oslo", "Kristiania"]}, {"id": "b", "golden_answers": ["Ås"]}), ("a", "b")
    ),
    "FlashRAG with the fields of 2Wiki": Form(
        rows(
            {"id": "a", "golden_answers": ["Oslo"],
             "metadata": {"type": "bridge", "supporting_facts": HUB_FACTS, "evidences": EVIDENCES}},
            {"id": "b", "golden_answers": ["Ås"]},
        ),
        ("a", "b"), answers=(("Oslo",), ("Ås",)),
        metadata=OF_2WIKI | {"supporting_facts": HUB_FACTS, "evidences": EVIDENCES},
    ),
    "Search-R1": Form([verl(0), verl(1)], ("nq/train/0", "hotpotqa/train/0"), name="t.parquet"),
    "Search-R1, named": Form(
        [verl(0), verl(1)], ("nq/train/0", "hotpotqa/train/0"), format="search_r1", name="t.parquet"
    ),
    "Search-R1 of the hub": Form(
        [
            verl(n, id="train_0", question=QUESTIONS[n], golden_answers=[["Oslo", "Kristiania"], ["Ås"]][n])
            for n in (0, 1)
        ],
        ("nq/train/0", "hotpotqa/train/0"), name="t.parquet",
    ),
    "HotpotQA": Form(
        rows(
            {"_id": "a", "answer": "Oslo", "supporting_facts": FACTS, "type": "bridge", "level": "hard",
             "context": [["Ann", ["s"]]]},
            {"_id": "b", "answer": "Ås", "supporting_facts": []},
        ),
        ("a", "b"), name="hotpot_dev.json", answers=(("Oslo",), ("Ås",)),
        metadata={"supporting_titles": ["Ann", "Oslo"], "type": "bridge", "level": "hard"},
    ),
    "2Wiki": Form(
        rows(
            {"_id": "a", "answer": "Oslo", "supporting_facts": FACTS, "evidences": EVIDENCES, "type": "bridge"},
            {"_id": "b", "answer": "Ås", "supporting_facts": []},
        ),
        ("a", "b"), name="dev.json", answers=(("Oslo",), ("Ås",)), metadata=OF_2WIKI,
    ),
    "2Wiki of the hub, as dicts of lists": Form(
        rows(
            {"id": "a", "answer": "Oslo", "supporting_facts": HUB_FACTS, "type": "bridge",
             "evidences": [{"fact": f, "relation": r, "entity": e} for f, r, e in EVIDENCES]},
            {"id": "b", "answer": "Ås", "supporting_facts": {"title": [], "sent_id": []}, "evidences": []},
        ),
        ("a", "b"), name="dev.parquet", answers=(("Oslo",), ("Ås",)), metadata=OF_2WIKI,
    ),
    "2Wiki of the hub, as JSON text": Form(
        rows(
            {"_id": "a", "answer": "Oslo", "supporting_facts": json.dumps(FACTS), "evidences": json.dumps(EVIDENCES),
             "type": "bridge"},
            {"_id": "b", "answer": "Ås", "supporting_facts": "[]", "evidences": "[]", "type": None},
        ),
        ("a", "b"), name="dev.parquet", answers=(("Oslo",), ("Ås",)), metadata=OF_2WIKI,
    ),
    "MuSiQue": Form(
        rows(
            {"id": "2hop__1_2", "answer": "Oslo", "answer_aliases": ["Kristiania"], "answerable": True,
             "paragraphs": [{"idx": 0, "title": "Ann", "is_supporting": True}, {"idx": 1, "title": "X"}],
             "question_decomposition": HOPS},
            {"id": "2hop__3_4", "answer": "Ås", "answer_aliases": [], "paragraphs": [], "question_decomposition": []},
        ),
        ("2hop__1_2", "2hop__3_4"),
        metadata={"supporting_titles": ["Ann"], "hop_answers": ["Eva", "Oslo"], "answerable": True},
    ),
    "BEIR": Form(
        rows({"_id": "1", "metadata": {}}, {"_id": "2", "metadata": {"url": "u"}}, "text"), ("1", "2"),
        name="queries.jsonl", answers=((), ()), metadata={},
    ),
    "BrowseComp-Plus": Form(
        rows(
            {"query_id": 7, "answer": "Oslo", "gold_docs": [{"docid": 3, "text": "t"}],
             "evidence_docs": [{"docid": 3}, {"docid": 4}], "negative_docs": []},
            {"query_id": 8, "answer": "Ås"}, "query",
        ),
        ("7", "8"), answers=(("Oslo",), ("Ås",)), metadata={"gold_doc_ids": ["3"], "evidence_doc_ids": ["3", "4"]},
    ),
    "SQuAD": Form(
        rows({"id": "s", "answers": {"text": ["Oslo", "Kristiania"], "answer_start": [1, 2]}},
             {"id": "t", "answers": {"text": ["Ås"], "answer_start": [0]}}),
        ("s", "t"), name="v.parquet",
    ),
    "TriviaQA": Form(
        rows({"question_id": "tc_1", "answer": {"value": "Oslo", "aliases": ["Oslo", "Kristiania"]}},
             {"question_id": "tc_2", "answer": {"value": "Ås", "aliases": []}}),
        ("tc_1", "tc_2"),
    ),
    "columns": Form(
        rows({"key": 1, "gold": {"names": ["Oslo", "Kristiania"]}, "docs": [{"docid": 3}, {"docid": "4"}]},
             {"key": 2, "gold": {"names": ["Ås"]}, "docs": []}, "asked"),
        ("1", "2"), format="question=asked,answers=gold.names,id=key,gold_doc_ids=docs.docid", name="c.parquet",
        metadata={"gold_doc_ids": ["3", "4"]},
    ),
    "columns without an id": Form(
        rows({"gold": "['Oslo', 'Kristiania']"}, {"gold": "Ås"}, "asked"), ("web_0", "web_1"),
        format="question=asked,answers=gold", name="web.jsonl", metadata={},
    ),
}  # fmt: skip


def write(folder: Path, form: Form) -> Path:
    file = folder / form.name
    if file.suffix == ".parquet":
        for row in form.rows:
            if isinstance(docs := row.get("docs"), list):
                row["docs"] = [{"docid": str(doc["docid"])} for doc in docs]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(form.rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(form.rows, ensure_ascii=False), encoding="utf-8")
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in form.rows)
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return file


def of_trajectories(file: Path, format: str, folder: Path) -> list[Question]:
    config = load_config(TrajectoriesConfig, values={"in_": str(file), "out": "x", "format": format})
    drawn = load_config(
        TrajectoriesConfig,
        values={"in_": str(file), "out": "x", "format": format, "num_questions": 2, "random_sample": True},
    )
    assert list(chosen_questions(config)) == list(chosen_questions(drawn))
    return list(chosen_questions(config))


def of_train_agent(file: Path, format: str, folder: Path) -> list[Question]:
    values = {"model": "m", "questions": str(file), "retrieval_url": "u", "out": "o", "format": format, "batch_size": 1}
    config = load_config(TrainAgentConfig, values=values | {"mini_batch_size": 1})
    return [item.record for item in training_questions(config)]


def of_evaluate(file: Path, format: str, folder: Path) -> list[Question]:
    from flashrag.config import Config

    from agentic_r_plugin.evaluation.benchmarks import check_questions
    from agentic_r_plugin.evaluation.pipeline import load_split

    split = file.name.partition(".")[0]
    check_questions(file, 2, format)
    settings = {"data_dir": str(folder.parent), "dataset_name": folder.name, "gpu_id": None, "disable_save": True}
    config = Config(config_dict=settings | {"save_metric_score": False, "save_intermediate_data": False})
    return [
        Question(id=item.id, question=item.question, golden_answers=tuple(item.golden_answers), metadata=item.metadata)
        for item in load_split(config, split, format)
    ]


def of_convert(file: Path, format: str, folder: Path) -> list[Question]:
    out = folder / "converted" / "out.jsonl"
    assert cli.main(["convert", "questions", "--in", str(file), "--out", str(out), "--format", format]) == 0
    return list(read_records(out, Question))


def of_coverage(file: Path, format: str, folder: Path) -> list[Question]:
    corpus, out = folder / "corpus" / "c.jsonl", folder / "covered" / "c.jsonl"
    corpus.parent.mkdir()
    corpus.write_text('{"id": "3", "contents": "\\"Ann\\"\\nAnn was born in Oslo."}\n')
    command = ["coverage", "--questions", str(file), "--corpus", str(corpus), "--out", str(out), "--format", format]
    assert cli.main([*command, "search.backend=bm25"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    questions = list(read_questions(file, format=format))
    assert [line["id"] for line in found] == [question.id for question in questions]
    assert [line["answer_in_corpus"] for line in found] == (
        [True, False] if questions[0].golden_answers else [None, None]
    )
    return questions


def of_logs(file: Path, format: str, folder: Path) -> list[Question]:
    """A log without ids and gold answers, which the questions give."""
    questions = list(read_questions(file, format=format))
    log, corpus, out = (folder / "logs" / f"{name}.jsonl" for name in ("log", "corpus", "out"))
    log.parent.mkdir()
    corpus.write_text('{"id": "3", "contents": "x"}\n')
    chats = [[{"role": "user", "content": item.question}, {"role": "assistant", "content": "x"}] for item in questions]
    log.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    command = ["convert", "trajectories", "--in", str(log), "--corpus", str(corpus), "--out", str(out)]
    assert cli.main([*command, "--questions", str(file), "--format", format]) == 0
    return [
        Question(id=item.id, question=item.question, golden_answers=item.golden_answers, metadata=question.metadata)
        for item, question in zip(read_records(out, Trajectory), questions, strict=True)
    ]


def of_qrels(file: Path, format: str, folder: Path) -> list[Question]:
    questions, out = list(read_questions(file, format=format)), folder / "qrels" / "out.trec"
    expected = [f"{item.id} 0 {name} 1" for item in questions for name in item.metadata.get("gold_doc_ids", ())]
    command = ["convert", "qrels", "--in", str(file), "--out", str(out), "--format", format]
    assert cli.main(command) == (0 if expected else 1)
    assert (out.read_text().splitlines() if expected else []) == expected
    return questions


READERS: dict[str, Callable[[Path, str, Path], list[Question]]] = {
    "trajectories": of_trajectories,
    "train-agent": of_train_agent,
    "evaluate": of_evaluate,
    "coverage": of_coverage,
    "convert questions": of_convert,
    "convert trajectories": of_logs,
    "convert qrels": of_qrels,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FORMS)
def test_every_command_reads_every_form(tmp_path, name, reader):
    form = FORMS[name]
    folder = tmp_path / "set"
    folder.mkdir()
    file = write(folder, form)
    if reader == "train-agent" and not any(form.answers):
        with pytest.raises(RecordError, match="has no golden answers"):
            READERS[reader](file, form.format, folder)
        return
    found = READERS[reader](file, form.format, folder)
    assert [(q.id, q.question, q.golden_answers) for q in found] == list(
        zip(form.ids, QUESTIONS, form.answers, strict=True)
    )
    if form.metadata is not None:
        assert found[0].metadata == form.metadata


def test_a_named_form_that_the_rows_do_not_have_is_refused(tmp_path):
    file = write(tmp_path, FORMS["FlashRAG"])
    with pytest.raises(RecordError, match=r"q\.jsonl:1: expected a field 'supporting_facts', as format=hotpotqa says"):
        list(read_questions(file, format="hotpotqa"))
    with pytest.raises(RecordError, match=r"q\.jsonl:1: expected a field 'asked', .* found only 'question', 'id'"):
        list(read_questions(file, format="question=asked"))


@pytest.mark.parametrize("format", ["nope", "answers=a", "question=", "question=q,gold=a", "question=q,,id=i"])
def test_an_unknown_form_is_refused(format):
    with pytest.raises(ConfigError, match=r"expected one of flashrag, hotpotqa, .* or question=COLUMN with any of"):
        question_form(format)


def test_named_columns_are_the_only_ones_that_are_read(tmp_path):
    row = {"question": "wrong", "golden_answers": ["wrong"], "q": "Q?", "a": None, "id": "x", "metadata": {"level": 1}}
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(row))
    (question,) = read_questions(file, format="question=q,answers=a")
    assert question == Question(id="x", question="Q?", golden_answers=())


def convert(capfd, *arguments: object) -> tuple[int, str]:
    return cli.main(["convert", "questions", *map(str, arguments)]), capfd.readouterr().err


def test_data_sets_saved_by_datasets_are_converted(tmp_path, capfd):
    datasets = pytest.importorskip("datasets")
    rows = [{"q": f"Who is {number}?", "a": {"text": [f"x{number}"]}} for number in range(3)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "dev": whole.select([2])}).save_to_disk(str(tmp_path / "nq"))
    columns = "format=question=q,answers=a.text"
    assert convert(capfd, f"in={tmp_path / 'one'}", f"out={tmp_path / '1.jsonl'}", columns)[0] == 0
    assert [q.id for q in read_records(tmp_path / "1.jsonl", Question)] == ["one_0", "one_1", "one_2"]
    assert convert(capfd, f"in={tmp_path / 'nq'}", f"out={tmp_path / '2.jsonl'}", columns, "split=dev")[0] == 0
    (question,) = read_records(tmp_path / "2.jsonl", Question)
    assert (question.id, question.question, question.golden_answers) == ("nq_dev_0", "Who is 2?", ("x2",))
    code, error = convert(capfd, f"in={tmp_path / 'nq'}", f"out={tmp_path / '3.jsonl'}", columns, "split=test")
    assert code == 1 and "its splits are train, dev" in error


def test_a_resume_with_another_saved_data_set_is_refused(tmp_path, capfd):
    datasets = pytest.importorskip("datasets")
    for name in ("one", "two"):
        datasets.Dataset.from_list([{"q": "Who?", "a": name}]).save_to_disk(str(tmp_path / name))
    given = [f"out={tmp_path / 'q.jsonl'}", "format=question=q,answers=a"]
    assert convert(capfd, f"in={tmp_path / 'one'}", *given)[0] == 0
    assert convert(capfd, f"in={tmp_path / 'one'}", *given, "--resume")[0] == 0
    code, error = convert(capfd, f"in={tmp_path / 'two'}", *given, "--resume")
    assert code == 1 and "data set was" in error
    code, error = convert(capfd, "in=hub:owner/name", *given, "--resume")
    assert code == 1 and 'now "hub:owner/name"' in error


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [("browsecomp_plus", {"query_id": None, "query": "Who?"}, "missing field 'id'"),
     ("beir", {"_id": "1", "text": None}, "expected a text field 'question'")],
)  # fmt: skip
def test_an_absent_value_in_a_named_form_is_an_error_with_its_line(tmp_path, form, row, message):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(RecordError, match=rf"q\.jsonl:1: {message}"):
        list(read_questions(file, format=form))


def test_a_hub_that_cannot_be_reached_is_an_error_with_the_way_out(tmp_path, capfd, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, error = convert(capfd, "in=hub:owner/name", f"out={tmp_path / 'q.jsonl'}", "split=test")
    assert code == 1 and "hub:owner/name, split 'test': `datasets` cannot open it: ConnectionError" in error
    assert "hf download --repo-type dataset owner/name" in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "qrels",
    ["query-id\tcorpus-id\tscore\r\n1\td 1\t2\r\n1\td2\t1\r\n2\td3\t0\r\n", "1 0 d1 2\n1 0 d2 1\n2 0 d3 0\n"],
    ids=["BEIR", "TREC"],
)
def test_the_qrels_choose_the_questions_and_name_their_gold_documents(tmp_path, capfd, qrels):
    file, given, out = write(tmp_path, FORMS["BEIR"]), tmp_path / "test.tsv", tmp_path / "test.jsonl"
    given.write_bytes(qrels.encode())
    assert convert(capfd, f"in={file}", f"qrels={given}", f"out={out}")[0] == 0
    (question,) = read_records(out, Question)
    assert (question.id, question.golden_answers) == ("1", ())
    assert question.metadata == {"gold_doc_ids": ["d 1" if "\t" in qrels else "d1", "d2"]}


@pytest.mark.parametrize(("line", "message"), [("1\td1", ":2: expected"), ("1\td1\thigh", ":2: expected")])
def test_a_broken_line_of_the_qrels_is_refused(tmp_path, capfd, line, message):
    file, given = write(tmp_path, FORMS["BEIR"]), tmp_path / "test.tsv"
    given.write_text(f"query-id\tcorpus-id\tscore\n{line}\n")
    code, error = convert(capfd, f"in={file}", f"qrels={given}", f"out={tmp_path / 'o.jsonl'}")
    assert code == 1 and f"test.tsv{message} a question id, a document id and a grade" in error


def test_qrels_that_are_no_text_are_refused(tmp_path, capfd):
    file, given = write(tmp_path, FORMS["BEIR"]), tmp_path / "test.tsv"
    given.write_bytes(b"1 0 d1 1\n1 0 \xff 1\n")
    code, error = convert(capfd, f"in={file}", f"qrels={given}", f"out={tmp_path / 'o.jsonl'}")
    assert code == 1 and "test.tsv:2: expected UTF-8" in error


@pytest.fixture
def beir(tmp_path) -> Path:
    """A BEIR data set as it is unpacked: three questions, of which the split `test` has two."""
    folder, names = tmp_path / "scifact", ("Ann", "Bob", "Cid")
    (folder / "qrels").mkdir(parents=True)
    queries = [{"_id": str(n), "text": f"Where was {name} born?", "metadata": {}} for n, name in enumerate(names)]
    passages = [{"_id": f"d{name[0]}", "title": name, "text": f"{name} was born.", "metadata": {}} for name in names]
    for name, lines in (("queries", queries), ("corpus", passages)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for split, lines in (("test", ["0\tdA\t1", "2\tdC\t1", "2\tdD\t1", "2\tdB\t0"]), ("dev", ["1\tdB\t2"])):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    return folder


OF_TEST = [("0", {"gold_doc_ids": ["dA"]}), ("2", {"gold_doc_ids": ["dC", "dD"]})]


@pytest.mark.parametrize("reader", ["trajectories", "convert questions", "coverage"])
def test_the_qrels_of_a_beir_data_set_are_its_questions(tmp_path, beir, reader, monkeypatch):
    if reader == "coverage":  # from within the folder of qrels
        monkeypatch.chdir(beir / "qrels")
    folder = tmp_path / "work"
    folder.mkdir()
    file = Path("test.tsv") if reader == "coverage" else beir / "qrels" / "test.tsv"
    found = READERS[reader](file, "", folder)
    assert [(question.id, question.metadata) for question in found] == OF_TEST


def test_evaluate_reads_a_split_of_a_beir_data_set(beir):
    from flashrag.config import Config

    from agentic_r_plugin.evaluation.benchmarks import check_questions, split_file
    from agentic_r_plugin.evaluation.pipeline import load_split

    check_questions(split_file(beir, "test"), 2)
    settings = {"data_dir": str(beir.parent), "dataset_name": beir.name, "gpu_id": None, "disable_save": True}
    config = Config(config_dict=settings | {"save_metric_score": False, "save_intermediate_data": False})
    found = load_split(config, "test")
    assert [(item.id, item.metadata) for item in found] == OF_TEST and found[0].question == "Where was Ann born?"
    with pytest.raises(ConfigError, match=r"split 'train': no .*train\.jsonl; .* holds corpus\.jsonl, queries\.jsonl"):
        split_file(beir, "train")


def test_the_folder_of_a_beir_data_set_is_converted_by_split_and_covered(tmp_path, beir, capfd):
    out = tmp_path / "dev.jsonl"
    assert convert(capfd, f"in={beir}", "split=dev", f"out={out}")[0] == 0
    assert [(q.id, q.metadata) for q in read_records(out, Question)] == [("1", {"gold_doc_ids": ["dB"]})]
    given = [f"questions={beir / 'qrels' / 'test.tsv'}", f"corpus={beir / 'corpus.jsonl'}", "search.backend=bm25"]
    assert cli.main(["coverage", *given, f"out={tmp_path / 'c.jsonl'}", "topk=[3]"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [(line["gold"], line["gold_in_corpus"], line["gold_ranks"]) for line in lines] == [(1, 1, [1]), (2, 1, [1])]


def test_the_whole_folder_of_a_beir_data_set_is_neither_questions_nor_a_corpus(tmp_path, beir, capfd):
    from agentic_r_plugin.search.corpus import Corpus

    for read in (lambda: list(read_questions(beir)), lambda: Corpus(beir)):
        with pytest.raises(
            RecordError, match=r"scifact: a BEIR data set: name its corpus, .*qrels/dev\.tsv, .*test\.tsv"
        ):
            read()
    assert "qrels/dev.tsv" in convert(capfd, f"in={beir}", f"out={tmp_path / 'o.jsonl'}")[1]


def test_a_change_of_the_questions_of_a_beir_data_set_is_noticed(beir):
    from agentic_r_plugin.store import file_fingerprint

    before = file_fingerprint(beir / "qrels" / "test.tsv")
    (beir / "queries.jsonl").write_text((beir / "queries.jsonl").read_text().replace("born", "seen"))
    assert file_fingerprint(beir / "qrels" / "test.tsv") != before


def test_questions_without_answers_get_retrieval_metrics_and_no_exact_match(tmp_path):
    from tests.evaluation.evaluation_toy import METRICS

    trajectory = {"turns": [{"passages": [{"id": "d1"}]}]}
    output = {"answer": "x", "retrieval_results": {}, "retrieved": [], "trajectory": trajectory}
    item = SimpleNamespace(
        id="1", golden_answers=[], choices=[], metadata={"gold_doc_ids": ["d1", "d2"]}, output=output
    )
    scores = {name: cls.__new__(cls).score for name, cls in METRICS.items()}
    for name in ("agentic_em", "agentic_f1", "agentic_sub_em", "answer_recall_at_3"):
        assert scores[name](item, []) is None
    assert scores["gold_document_recall"](item, []) == 0.5


def test_an_unreadable_form_names_the_columns_as_a_way_out(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"asked": "Q?"}')
    with pytest.raises(AgenticRError, match=r"q\.jsonl:1: .*format=question=COLUMN"):
        list(read_questions(file))


def test_a_data_set_of_the_hub_is_opened_once_and_numbered_by_subset_and_split(tmp_path, capfd, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pyarrow.parquet.write_table(pyarrow.table({"q": ["Who?", "Where?"], "a": ["x", "y"]}), tmp_path / "v.parquet")
    opened, load = [], datasets.load_dataset

    def of_the_hub(name, subset, *, split, streaming):
        opened.append((name, subset, split))
        files = {split: str(tmp_path / "v.parquet")}
        return load("parquet", data_files=files, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", of_the_hub)
    for number, (split, subset) in enumerate([("train", ""), ("validation", "rc.web")]):
        given = ["in=hub:me/trivia.qa", f"out={tmp_path / f'{number}.jsonl'}", "format=question=q,answers=a"]
        assert convert(capfd, *given, f"split={split}", *([f"subset={subset}"] if subset else []))[0] == 0
    assert opened == [("me/trivia.qa", None, "train"), ("me/trivia.qa", "rc.web", "validation")]
    ids = [q.id for number in (0, 1) for q in read_records(tmp_path / f"{number}.jsonl", Question)]
    assert ids == [f"trivia.qa_{part}_{n}" for part in ("train", "rc.web_validation") for n in (0, 1)]


def test_numbered_ids_of_files_with_dots_in_their_names_do_not_collide(tmp_path):
    for name in ("nq.train.jsonl", "nq.dev.jsonl", "web.json"):
        (tmp_path / name).write_text('{"asked": "Q?"}\n')
    ids = [question.id for question in read_questions(tmp_path, format="question=asked")]
    assert ids == ["nq.dev_0", "nq.train_0", "web_0"]


def test_what_the_qrels_leave_out_is_counted_and_said(tmp_path, capfd, beir, caplog):
    qrels = beir / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text() + "\n9\tdA\t1\n7\tdA\t1\n8\tdA\t0\n")
    said = "2 of 4 questions with a relevant document are not among the questions and are left out, such as '7'"
    for number, given in enumerate(([f"in={beir}", "split=test"], [f"in={beir / 'queries.jsonl'}", f"qrels={qrels}"])):
        out = tmp_path / f"{number}.jsonl"
        assert convert(capfd, *given, f"out={out}")[0] == 0
        report = json.loads((tmp_path / f"{number}.jsonl.report.json").read_text())
        assert (report["questions"], report["without_relevant_document"], report["only_in_qrels"]) == (2, 1, 2)
    assert caplog.text.count(said) == 1  # commands read their questions more than once
