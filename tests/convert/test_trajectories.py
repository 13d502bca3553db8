"""`agentic-r convert trajectories`: logs of other agents, and the same groups from our own trajectories' chat form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentic_r_plugin import cli
from agentic_r_plugin.convert.trajectories import trajectory, trajectory_from_text
from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.records import Passage, Question, StopReason, Trajectory, text_id
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.store import read_records
from agentic_r_plugin.tags import compact, search_r1

AGENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "agent"
CORPUS = [
    {"id": "0", "contents": '"Emma"\nEmma is a novel by Jane  Austen.'},
    {"id": "1", "contents": '"Jane Austen"\nJane Austen was born in Steventon.'},
    {"id": "2", "contents": '"Ulm (city)"\nUlm <b>lies</b> on the Danube.'},
]
QUESTIONS = [
    {"id": "q1", "question": "Where was the author of Emma born?", "golden_answers": ["Steventon"]},
    {"id": "q2", "question": "Which river is Ulm on?", "golden_answers": ["Danube"]},
]


def write(file: Path, rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def convert(tmp_path: Path, rows, *options: str) -> tuple[list[Trajectory], dict]:
    """Convert rows of a log; returns the trajectories and the report."""
    log = write(tmp_path / "log.jsonl", rows) if isinstance(rows, list) else rows
    corpus, questions = write(tmp_path / "corpus.jsonl", CORPUS), write(tmp_path / "questions.jsonl", QUESTIONS)
    out = tmp_path / "out.jsonl"
    given = (f"in={log}", f"out={out}", f"corpus={corpus}", f"questions={questions}", *options)
    assert cli.main(["convert", "trajectories", *given]) == 0
    return list(read_records(out, Trajectory)), json.loads((tmp_path / "out.jsonl.report.json").read_text())


def call(number: int, content: str | None, arguments, **fields):
    function = {"name": "search", "arguments": json.dumps(arguments)}
    calls = [{"id": f"c{number}", "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls, **fields}


def result(number: int, content) -> dict:
    text = content if isinstance(content, str) else json.dumps(content)
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


CHAT = {
    "id": "chatcmpl-1",
    "messages": [
        {"role": "system", "content": "You can search."},
        {"role": "user", "content": "Answer it.\nQuestion: Where was the author of Emma born?\n"},
        call(1, None, {"query": "author of Emma"}, reasoning_content="Who wrote it?"),
        result(1, "Doc 1(Title: Emma) Emma is a novel by Jane Austen.\nDoc 2(Title: Persuasion) A novel."),
        call(2, "<think>Where was she born?</think>", {"queries": ["Jane Austen birthplace"]}),
        result(2, {"result": [[{"document": {"id": "1", "contents": '"Jane Austen"\nJane Austen was born in'}}]]}),
        call(3, "Let me compute.", {"expression": "1 + 1"}),
        result(3, "2"),
        {"role": "assistant", "content": "<think>I read it.</think>\nExact Answer: Steventon\nConfidence: 90%"},
    ],
}


def test_a_chat_with_tool_calls_becomes_a_trajectory_in_the_protocol_s_form(tmp_path):
    (found,), report = convert(tmp_path, [CHAT])
    assert (found.id, found.answer, found.em, found.stop_reason) == ("q1", "Steventon", 1, StopReason.ANSWERED)
    assert [(turn.turn, turn.reasoning, turn.query) for turn in found.turns] == [
        (1, "Who wrote it?", "author of Emma"),
        (2, "Where was she born?", "Jane Austen birthplace"),
    ]
    first, second = ([passage.id for passage in turn.passages] for turn in found.turns)
    assert first[0] == "0" and first[1].startswith("text-") and second == ["1"]
    assert report["passages"] == {"by_id": 1, "by_text": 1, "not_found": 1}
    assert (report["searches"], report["calls_left_out"], report["errors"]) == (2, 1, 0)
    assert found.text.startswith(
        "<think> Who wrote it? </think>\n<search> author of Emma </search>\n\n<information>Doc 1(Title: "
        '"Emma") Emma is a novel by Jane  Austen.\nDoc 2(Title: "Persuasion") A novel.</information>\n\n'
        "<think>Where was she born?</think><search> Jane Austen birthplace </search>"
    )
    assert [query for query, _ in search_r1.searches(found.text)] == [turn.query for turn in found.turns]


def test_a_dump_of_tagged_text_is_kept_as_it_is(tmp_path):
    block = search_r1.render([Passage(id="", title="Ulm (city)", text="Ulm <b>lies</b> on the Danube.")])
    text = f"<think>Look.</think>\n<search>Ulm river</search>{block}<think>So.</think>\n<answer> Danube </answer>"
    prompt = "<|im_start|>user\nSearch.\nQuestion: Which river is Ulm on?\n<|im_end|>\n<|im_start|>assistant\n"
    dump = {"input": prompt, "output": f"{text}<|im_end|>", "score": 1.0, "step": 7}
    (found,), report = convert(tmp_path, [dump, dump])
    assert (found.id, found.text, found.em) == ("q2", text, 1)
    assert [(t.reasoning, t.query, [p.id for p in t.passages]) for t in found.turns] == [("Look.", "Ulm river", ["2"])]
    assert report["repeated"] == 1 and report["passages"]["by_text"] == 1


def test_run_files_of_browsecomp_plus_are_read_one_a_file(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    snippet = [{"docid": "0", "score": 3.5, "snippet": "Emma is a novel"}, {"docid": "9", "snippet": "Other."}]
    events = [
        {"type": "reasoning", "tool_name": None, "arguments": None, "output": ["Who", "wrote it?"]},
        {"type": "tool_call", "tool_name": "search", "arguments": '{"query": "Emma"}', "output": json.dumps(snippet)},
        {"type": "tool_call", "tool_name": "get_document", "arguments": '{"docid": "0"}', "output": "{}"},
        {"type": "output_text", "tool_name": None, "arguments": None, "output": "Explanation: x\nExact Answer: Bath"},
    ]
    run = {"query_id": "q1", "tool_call_counts": {"search": 1}, "status": "completed", "result": events}
    (folder / "run_1.json").write_text(json.dumps(run, indent=2))
    (found,), report = convert(tmp_path, folder)
    assert (found.id, found.answer, found.em, found.turns[0].reasoning) == ("q1", "Bath", 0, "Who\nwrote it?")
    assert [(passage.id[:5], passage.score) for passage in found.turns[0].passages] == [("0", 3.5), ("text-", 0.0)]
    assert report["passages"] == {"by_id": 1, "by_text": 0, "not_found": 1} and report["calls_left_out"] == 1


def test_one_bad_record_is_kept_apart_and_none_at_all_is_an_error(tmp_path, capsys):
    log = write(tmp_path / "log.jsonl", [{"messages": [{"role": "user", "content": "Who?"}]}, CHAT, {"other": 1}])
    log.write_text(log.read_text() + '{"cut')
    (found,), report = convert(tmp_path, log)
    assert found.id == "q1" and (report["read"], report["errors"]) == (4, 3)
    apart = [json.loads(line) for line in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]
    assert [line["unit"].rpartition(":")[2] for line in apart] == ["1", "3", "4"]
    assert "no question with id None or text 'Who?'" in apart[0]["error"] and "'messages' (chat)" in apart[1]["error"]
    bad = write(tmp_path / "bad.jsonl", [{"other": 1}])
    out = tmp_path / "none.jsonl"
    assert cli.main(["convert", "trajectories", f"in={bad}", f"out={out}", f"corpus={tmp_path / 'corpus.jsonl'}"]) == 1
    assert "none of 1 records could be read" in capsys.readouterr().err and not out.exists()
    bad.write_text("")
    assert cli.main(["convert", "trajectories", f"in={bad}", f"out={out}", f"corpus={tmp_path / 'corpus.jsonl'}"]) == 1
    assert "bad.jsonl: no record in it" in capsys.readouterr().err and not out.exists()
    csv = tmp_path / "out.csv"
    assert cli.main(["convert", "trajectories", f"in={log}", f"out={csv}", f"corpus={tmp_path / 'corpus.jsonl'}"]) == 1
    assert "out.csv: records are written as .jsonl, .json" in capsys.readouterr().err and not csv.exists()


def test_an_id_of_another_question_or_another_passage_is_not_trusted(tmp_path):
    messages = [
        *CHAT["messages"][:3],
        result(1, [{"id": "2", "title": "Emma", "text": "Emma is a novel by Jane Austen."}]),
    ]
    (found,), report = convert(tmp_path, [{"id": "q2", "messages": messages}])
    assert found.id == "q1" and [passage.id for passage in found.turns[0].passages] == ["0"]
    assert report["passages"]["by_text"] == 1 and found.answer is None and found.stop_reason == StopReason.MAX_TURNS


def chat_of(ids, order) -> dict:
    """Two searches, each for the passage that it finds; `order` of the calls (0, 1) and their results (2, 3)."""
    calls = [call(0, None, {"query": query}) for query in ("Ulm river", "Emma author")]
    shown = ({"title": "", "text": "Ulm <b>lies</b> on the Danube."}, {"title": "", "text": "Emma is a novel"})
    tools = [{"role": "tool", "content": json.dumps([item])} for item in shown]
    for message, tool, name in zip(calls, tools, ids, strict=True):
        message["tool_calls"][0]["id"] = tool["tool_call_id"] = name
    question = {"role": "user", "content": "Question: Which river is Ulm on?"}
    return {"messages": [question, *([*calls, *tools][place] for place in order)]}


@pytest.mark.parametrize("ids", [(None, None), ("call_0", "call_0"), (1, 2)], ids=str)
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 2, 3)], ids=["in turn", "together"])
def test_results_belong_to_their_calls_whatever_the_ids(tmp_path, ids, order):
    (found,), report = convert(tmp_path, [chat_of(ids, order)])
    shown = [(turn.query, [passage.id for passage in turn.passages]) for turn in found.turns]
    assert shown == [("Ulm river", ["2"]), ("Emma author", [text_id("Emma is a novel")])]
    assert report["calls_left_out"] == 0


def test_a_result_that_no_id_assigns_is_no_result(tmp_path):
    (found,), report = convert(tmp_path, [chat_of((None, None), (0, 1, 3))])
    assert found.turns == () and report["calls_left_out"] == 2


def test_text_before_a_later_search_is_no_answer(tmp_path):
    said = {"role": "assistant", "content": "I look it up."}
    log = [{"messages": [*CHAT["messages"][:2], said, *CHAT["messages"][2:4]]}]
    (found,), _ = convert(tmp_path, log)
    assert (found.answer, found.stop_reason) == (None, StopReason.MAX_TURNS)
    assert found.turns[0].reasoning == "I look it up.\nWho wrote it?"


def test_a_call_without_arguments_is_left_out(tmp_path):
    done = {"role": "assistant", "tool_calls": [{"id": "c9", "function": {"name": "finish", "arguments": ""}}]}
    (found,), report = convert(tmp_path, [{"messages": [*CHAT["messages"][:4], done, CHAT["messages"][-1]]}])
    assert found.answer == "Steventon" and (report["searches"], report["calls_left_out"]) == (1, 1)


def test_questions_in_shards_have_the_ids_that_the_whole_folder_has(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    for source, question in (("nq", "Which river is Ulm on?"), ("hotpotqa", "Where was the author of Emma born?")):
        row = {"id": "train_0", "data_source": source, "question": question, "golden_answers": ["x"]}
        write(folder / f"{source}.jsonl", [row | {"extra_info": {"split": "train", "index": 0}}])
    logs = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]}
            for text in ("Which river is Ulm on?", "Where was the author of Emma born?")]  # fmt: skip
    found, report = convert(tmp_path, logs, f"questions={folder}")
    assert [record.id for record in found] == ["nq/train/0", "hotpotqa/train/0"] and report["repeated"] == 0


def test_a_trajectory_from_python():
    question = Question(id="q2", question="Which river?", golden_answers=("Danube",))
    steps = [("I look.", "Ulm", [Passage(id="2", title="Ulm", text="On the Danube.")]), ("", "Danube", ["A river."])]
    found = trajectory(question, steps, "the Danube", reasoning="I know.", protocol=compact)
    assert [(turn.query, [p.id for p in turn.passages]) for turn in found.turns] == [
        ("Ulm", ["2"]), ("Danube", [text_id("A river.")])
    ]  # fmt: skip
    assert found.em == 1 and trajectory_from_text(question, found.text, protocol=compact).answer == "the Danube"
    with pytest.raises(RecordError, match="do they hold its tags"):
        trajectory(question, [("", "a </search> b", ["x"])], None)
    with pytest.raises(RecordError, match="neither a search nor an answer"):
        trajectory_from_text(question, "just text")


def as_chat(record: Trajectory, corpus: Corpus) -> dict:
    """A trajectory as the messages of a chat with tool calls; the passages without ids."""
    messages = [{"role": "user", "content": compact.prompt(record.question)}]
    texts = [text for _, text in compact.searches(record.text)][: len(record.turns)]
    before = 0
    for turn, through in zip(record.turns, texts, strict=True):
        messages.append(call(turn.turn, through[before:].rpartition("<search>")[0], {"query": turn.query}))
        shown = [corpus.by_id(passage.id) for passage in turn.passages]
        messages.append(result(turn.turn, [{"title": item.title, "text": item.text} for item in shown]))
        before = len(through) + len(compact.render(shown))
    if record.answer is not None:
        messages.append({"role": "assistant", "content": record.text[before:]})
    return {"messages": messages}


def test_candidates_from_chat_messages_equal_those_made_directly(tmp_path):
    """Relevance, correctness and groups read nothing of a trajectory but its candidates, prefix included."""
    world = ["people=60", "works=30", "train_questions=4", "dev_questions=2", "test_questions=2"]

    def run(*arguments):
        assert cli.main(list(map(str, arguments))) == 0

    run("world", f"out={tmp_path}", *world)
    (data,) = (path.parent for path in tmp_path.glob("*/corpus.jsonl"))
    search = ["search.backend=bm25", f"search.corpus={data / 'corpus.jsonl'}"]
    agent = [f"llm.model={AGENT}", "protocol=compact", "limits.max_tokens=1024"]
    run("trajectories", f"in={data / 'train.jsonl'}", f"out={tmp_path / 'direct.jsonl'}", *search, *agent)
    with Corpus(data / "corpus.jsonl") as corpus:
        records = list(read_records(tmp_path / "direct.jsonl", Trajectory))
        log = write(tmp_path / "chat.jsonl", [as_chat(record, corpus) for record in records])
    given = [f"corpus={data / 'corpus.jsonl'}", f"questions={data / 'train.jsonl'}", "protocol=compact"]
    run("convert", "trajectories", f"in={log}", f"out={tmp_path / 'other.jsonl'}", *given)
    for name in ("direct", "other"):
        out = tmp_path / f"{name}-candidates.jsonl"
        run("candidates", f"in={tmp_path / f'{name}.jsonl'}", f"out={out}", "protocol=compact", *search)
    candidates = (tmp_path / "direct-candidates.jsonl").read_bytes()
    assert candidates and (tmp_path / "other-candidates.jsonl").read_bytes() == candidates


@pytest.mark.parametrize(
    "between", [[], [call(9, None, {"query": "x"}), result(9, "[]")]], ids=["answered", "searching"]
)
def test_a_chat_with_several_questions_is_refused(tmp_path, between):
    """Searches of one question, and the answer to another, are no trajectory."""
    second = {"role": "user", "content": "Which river is Ulm on?"}
    messages = [*CHAT["messages"], *between, second, {"role": "assistant", "content": "Danube"}]
    (found,), report = convert(tmp_path, [{"messages": messages}, CHAT])
    assert found.answer == "Steventon" and report["errors"] == 1
    (apart,) = map(json.loads, (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines())
    assert "another message of the user after the assistant's reply (message" in apart["error"]
    assert "Which river is Ulm on?" in apart["error"] and "one chat for each question" in apart["error"]


@pytest.mark.parametrize("own", [False, True], ids=["from the file", "from the log"])
def test_the_question_is_found_in_several_first_messages_of_the_user(tmp_path, own):
    greeting = {"role": "assistant", "content": "How can I help?"}
    instructed = {"role": "user", "content": "Use the tool.\nBe brief."}
    asked = {"role": "user", "content": "Where was the author of Emma born?"}
    row = {"messages": [greeting, instructed, asked, *CHAT["messages"][2:]]} | (
        {"id": "q1", "golden_answers": ["Steventon"]} if own else {}
    )
    (found,), _ = convert(tmp_path, [row], *(['questions=""'] if own else []))
    assert (found.id, found.question, found.em) == ("q1", asked["content"], 1)
