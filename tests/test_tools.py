"""Agents that call tools, in the templates of several families: ids, mask, answer and records, whatever is written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from agentic_r_plugin.backends import SearchSpec
from agentic_r_plugin.data.candidates import CandidatesConfig, CandidatesWorker, queries_of
from agentic_r_plugin.data.continuations import Continuations
from agentic_r_plugin.errors import ConfigError, RecordError, SearchError
from agentic_r_plugin.llm.base import Completion, Request, Sampling
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.protocol import Finished, Limits, Malformed, Open, Prefix, Search
from agentic_r_plugin.records import Candidates, Passage, Question, StopReason, Trajectory, Turn
from agentic_r_plugin.rollout import run_sessions, to_trajectory
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.session import Session
from agentic_r_plugin.tags import compact
from agentic_r_plugin.tools import SEARCH, ToolProtocol, tool_calls
from tests.chat_templates import PROTOCOLS, codec, tokenizer
from tests.test_protocol_properties import AnyModel, AnySearch

NAMES = sorted(PROTOCOLS)
PIECES = [
    '<tool_call>\n{"name": "search", "arguments": {"query": "Emma"}}\n</tool_call>',
    '{"name": "search", "parameters": {"query": "Emma"}}',
    "<tool_call><function=search><parameter=query>\nEmma\n</parameter></function></tool_call>",
    '{"name": "open", "arguments": {}}',
    '"\\ud800"',
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<answer>",
    "</answer>",
    "\\boxed{", "}", "{", "[" * 3000, "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|endoftext|>", "<|python_tag|>",
    '<tool_call>\n{"name": "open", "arguments": {"id": "1"}}\n</tool_call>',
    "(the turn of the model)", "\n", " ", "Paris", "\ufffd", "é🙂",
]  # fmt: skip
LIMITS = Limits(max_tokens=4000, max_response_tokens=900, max_observation_tokens=300)
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


# --- Whatever is written ----------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(NAMES),
    several=st.booleans(),
    rule=st.sampled_from(["tag", "boxed", "message"]),
    written=st.lists(texts, min_size=1, max_size=4),
    found=st.lists(texts, max_size=3),
    limits=st.builds(
        Limits,
        max_searches=st.integers(0, 4),
        max_malformed=st.integers(0, 2),
        max_tokens=st.integers(700, 1500),
        max_response_tokens=st.integers(1, 200),
        max_observation_tokens=st.integers(90, 200),
        max_document_tokens=st.integers(90, 300),
        max_opens=st.integers(0, 3),
    ),
)
def test_any_model_and_any_passages_keep_mask_answer_and_limits(
    name: str, several: bool, rule: str, written: list[str], found: list[str], limits: Limits
) -> None:
    tools = ("search", "open") if several else ("search",)
    protocol = replace(PROTOCOLS[name], several_calls=several, answer=rule, tools=tools)
    check_any(protocol, codec(name), written, found, limits)


class AnyDocuments(AnySearch):
    """Opens the documents that it finds."""

    def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        return [Passage(id=name, title=name, text=self.texts[int(name)]) for name in ids]


def check_any(
    protocol: ToolProtocol, codec: TokenizerCodec, written: list[str], found: list[str], limits: Limits
) -> None:
    session, model = Session(protocol, codec, limits, "Who?"), AnyModel(codec, written)  # type: ignore[arg-type]
    run_sessions([session], model, AnyDocuments(found), topk=3, sampling=Sampling())  # type: ignore[arg-type]
    finished, ids, mask = session.finished, session.response_ids, session.response_mask
    assert isinstance(finished, Finished)
    record = to_trajectory(session, Question(id="q", question="Who?", golden_answers=("x",)))
    assert Trajectory.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    if not model.wrote:
        assert finished.stop_reason is StopReason.MAX_TOKENS and not ids
        return
    assert len(mask) == len(ids) and mask[-1] == 1
    assert [token for token, kept in zip(ids, mask, strict=True) if kept] == list(chain.from_iterable(model.wrote))
    assert len(session.ids) <= limits.max_tokens
    assert all(len(turn) <= limits.max_response_tokens for turn in model.wrote)
    assert session.searches <= limits.max_searches and len(session.turns) <= session.searches
    assert session.malformed <= limits.max_malformed + 1 and session.opens <= limits.max_opens
    for segment in session.segments[1::2]:
        assert not segment.by_model and codec.decode(segment.ids) == segment.text
    last = protocol.read(codec.decode(model.wrote[-1]), codec)
    if finished.stop_reason is StopReason.ANSWERED:
        assert last == finished and finished.answer is not None
        assert finished.answer in codec.decode(model.wrote[-1]) or "\\" in codec.decode(model.wrote[-1])
    else:
        assert finished.answer is None and not isinstance(last, Finished)
    assert sum(record.runs) == len(record.text)
    prefixes = protocol.prefixes(record)
    assert [prefix.query for prefix in prefixes] == [turn.query for turn in record.turns]
    for prefix in prefixes:
        end = prefix.text[prefix.turn_start or 0 :]
        asked = protocol.read(end if prefix.turn_start is not None else _last_turn(record, len(prefix.text)), codec)
        assert isinstance(asked, tuple) and isinstance(asked[-1], Search) and asked[-1].query == prefix.query
    for piece in protocol.pieces(record):
        assert piece.text in record.text or piece.kind == "search" or "think" in record.text


def _last_turn(record: Trajectory, end: int) -> str:
    """The model's turn that goes on to a place of the text."""
    start = max(sum(record.runs[:i]) for i in range(0, len(record.runs), 2) if sum(record.runs[:i]) < end)
    return record.text[start:end]


# --- As the template writes it ----------------------------------------------------------------------------------------

words = st.text(alphabet=st.sampled_from("ab é🙂\"\\'{}:,.?"), min_size=1, max_size=12).map(lambda text: f"q{text}.")


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    turns=st.lists(st.lists(words, min_size=1, max_size=3), max_size=3),
    shown=st.lists(words, min_size=1, max_size=3),
    ended=st.booleans(),
)
def test_a_trajectory_decodes_to_the_templates_own_rendering(
    name: str, turns: list[list[str]], shown: list[str], ended: bool
) -> None:
    protocol, tokens = PROTOCOLS[name], codec(name)
    if name == "llama3":  # its template renders one call per turn
        turns = [queries[:1] for queries in turns]
    session = Session(protocol, tokens, replace(LIMITS, max_searches=9, max_tokens=9000), "Who?")
    passages = [Passage(id=str(i), title="T", text=text) for i, text in enumerate(shown)]
    messages: list[dict[str, Any]] = protocol._messages("Who?")
    wrote: list[int] = []
    for queries in turns:
        calls = [{"type": "function", "function": {"name": "search", "arguments": {"query": q}}} for q in queries]
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        ids = _as_rendered(tokens, messages, ended=ended)
        wrote += ids
        action: object = session.model_wrote(ids)
        for query in queries:
            assert isinstance(action, Search) and action.query == query.strip()
            messages.append({"role": "tool", "content": protocol.render(passages)})
            action = session.found(passages)
        assert action is None
    answer = {"tag": "<answer>Ann</answer>", "boxed": "\\boxed{Ann}", "message": "Ann"}[protocol.answer]
    messages.append({"role": "assistant", "content": answer})
    ids = _as_rendered(tokens, messages, ended=True)
    assert session.model_wrote(ids) == Finished(StopReason.ANSWERED, "Ann")
    rendered = tokens.chat(messages, [SEARCH], {}, reply=False)
    assert tokens.decode(session.ids) == rendered.rstrip("\n")
    kept = [token for token, kept in zip(session.response_ids, session.response_mask, strict=True) if kept]
    assert kept == wrote + ids


def _as_rendered(tokens: TokenizerCodec, messages: list[dict[str, Any]], *, ended: bool) -> list[int]:
    """Ids of the last message, as the template writes it, with or without its end-of-turn token."""
    before = tokens.chat(messages[:-1], [SEARCH], {})
    ids = tokens.encode(tokens.chat(messages, [SEARCH], {}, reply=False).removeprefix(before).rstrip("\n"))
    return ids if ended else ids[:-1]


def test_the_reasoning_that_the_template_would_drop_stays_in_the_ids() -> None:
    tokens, protocol = codec("qwen3"), PROTOCOLS["qwen3"]
    session = Session(protocol, tokens, LIMITS, "Who?")
    first = tokens.encode(protocol.write_search("I need it.", "one", tokens))
    session.model_wrote(first)
    session.found([Passage(id="1", title="T", text="x")])
    assert tokens.decode(session.response_ids[: len(first)]) == (
        "<think>\nI need it.\n</think>\n\n"
        '<tool_call>\n{"name": "search", "arguments": {"query": "one"}}\n</tool_call><|im_end|>'
    )


def test_template_arguments_reach_the_prompt_and_every_turn() -> None:
    protocol = ToolProtocol(name="quiet", template_arguments={"enable_thinking": False})
    session = Session(protocol, codec("qwen3"), LIMITS, "Who?")
    quiet = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert codec("qwen3").decode(session.prompt_ids).endswith(quiet)
    session.model_wrote(codec("qwen3").encode(PIECES[0]))
    session.found([])
    assert session.text.endswith(f"No passage was found.\n</tool_response><|im_end|>\n{quiet}")


# --- Malformed turns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ('{"name": "browse", "arguments": {"query": "x"}}', "there is no tool 'browse'"),
        ('{"name": "search", "arguments": {"query": "x"}', "not valid JSON"),
        ('{"name": "search", "arguments": {"q": "x"}}', "needs the argument 'query'"),
        ('{"name": "search", "arguments": {"query": " "}}', "needs the argument 'query'"),
        ('{"name": "search", "arguments": ["x"]}', "expected an object as the call's arguments"),
        ('{"name": "search", "arguments": {"query": "\\ud800"}}', "half a character"),
        ("[" * 100_000, "not valid JSON"),
        ('["search"]', "expected an object with 'name'"),
        ('{"name": "<|im_end|>", "arguments": {}}', "there is no tool '‹|im_end|>'"),
    ],
)
def test_a_broken_call_is_a_malformed_turn_with_a_tool_message_that_says_so(call: str, problem: str) -> None:
    session = Session(
        PROTOCOLS["qwen3"], codec("qwen3"), replace(LIMITS, max_response_tokens=200_000, max_tokens=10**6), "Q"
    )
    good = PIECES[0]
    session.model_wrote(codec("qwen3").encode(f"{good}\n<tool_call>\n{call}\n</tool_call><|im_end|>"))
    assert session.malformed == 1 and session.turns == [] and session.pending is None
    environment = session.segments[-1].text
    assert problem in environment and environment.count("<|im_end|>") == 1
    assert environment.startswith("\n<|im_start|>user") and "<tool_response>\nError: " in environment


def test_a_turn_without_call_and_answer_is_answered_by_a_user_message() -> None:
    session = Session(PROTOCOLS["qwen3"], codec("qwen3"), LIMITS, "Q")
    session.model_wrote(codec("qwen3").encode("Well.<|im_end|>"))
    assert session.segments[-1].text.startswith("\n<|im_start|>user\nThat was neither a call nor an answer.")


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        ("tag", "<think>a</think><answer>one</answer> or <answer> two </answer><|im_end|>", "two"),
        ("boxed", "It is \\boxed{\\text{Ann} {B}}.<|im_end|>", "Ann {B}"),
        ("message", "<think>a <answer>no</answer></think>\n\nJane Austen<|im_end|>", "Jane Austen"),
        ("message", "<think>still thinking", None),
        ("tag", "<think><answer>no</answer></think>none", None),
        ("tag", "<think>It goes inside <answer> and </answer>, so", None),
        ("boxed", "<think>Perhaps \\boxed{no}, or", None),
        ("tag", "<answer>yes</answer> <think>or", "yes"),
        ("tag", '<think><tool_call>{"name": 1}</tool_call></think><answer>yes</answer>', "yes"),
    ],
)
def test_the_answer_is_read_by_the_rule_and_never_from_the_thoughts(rule: str, text: str, answer: str | None) -> None:
    found = replace(PROTOCOLS["qwen3"], answer=rule).read(text, codec("qwen3"))
    assert isinstance(found, Malformed) if answer is None else found == Finished(StopReason.ANSWERED, answer)
    if text.startswith("<think>"):  # whoever opens the thought
        opened = replace(PROTOCOLS["qwen3_thinking"], answer=rule).read(text[7:], codec("qwen3_thinking"))
        assert opened == found


def test_a_template_that_opens_the_thought_leaves_prompt_turns_and_reasoning_exact() -> None:
    tokens, protocol = codec("qwen3_thinking"), PROTOCOLS["qwen3_thinking"]
    session = Session(protocol, tokens, LIMITS, "Who?")
    assert tokens.decode(session.prompt_ids).endswith("<|im_start|>assistant\n<think>\n")
    turns = [
        f"Not closed. {call('one')}<|im_end|>",
        f"Closed.\n</think>\n\n{call('two')}",
        "It may be Ann",
        "</think>Ann",
    ]
    for turn in turns[:2]:
        assert isinstance(session.model_wrote(tokens.encode(turn)), Search)
        session.found([Passage(id="1", title="T", text="x")])
    assert [turn.reasoning for turn in session.turns] == ["Not closed.", "Closed."]
    session.model_wrote(tokens.encode(turns[2]))
    assert session.malformed == 1 and session.finished is None, "a thought that is cut is no answer"
    assert session.model_wrote(tokens.encode(turns[3])) == Finished(StopReason.ANSWERED, "Ann")
    assert [segment.text for segment in session.segments if segment.by_model] == turns
    for segment in session.segments[1::2]:
        assert segment.text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
    record = to_trajectory(session, Question(id="q", question="Who?", golden_answers=("Ann",)))
    assert [piece.text for piece in protocol.pieces(record) if piece.kind == "answer"] == ["Ann"]


def test_xml_parameters_and_bare_json_are_read() -> None:
    text = "So.<tool_call>\n<function=search>\n<parameter=query>\nJane  Austen\n</parameter>\n</function>\n</tool_call>"
    (found,) = PROTOCOLS["qwen3_coder"].read(text, codec("qwen3_coder"))  # type: ignore[misc]
    assert found == Search("Jane  Austen", "So.", len(text))
    one, two = '{"name": "search", "parameters": {"query": "a"}}', '{"name": "search", "parameters": {"query": "b"}}'
    found = PROTOCOLS["llama3"].read(f"<|python_tag|>{one}; {two}<|eot_id|>", codec("llama3"))
    assert [call.query for call in found] == ["a", "b"]  # type: ignore[union-attr]


def test_without_several_calls_generation_stops_after_the_first() -> None:
    one = replace(tool_calls, several_calls=False)
    assert (one.stop, tool_calls.stop) == (("</tool_call>",), ())
    assert len(one.read(PIECES[0] * 2, codec("qwen3"))) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"call_form": "yaml"}, "json, xml, bare_json"), ({"answer": "?"}, "tag, boxed"), ({"instruction": ""}, "once")],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(tool_calls, **change)  # type: ignore[arg-type]


PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def with_template(template: str) -> TokenizerCodec:
    copy = type(tokenizer("hermes"))(
        tokenizer_object=tokenizer("hermes")._tokenizer, eos_token="<|im_end|>", chat_template=template
    )
    return TokenizerCodec(copy)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PLAIN, "does not show tools"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "drops the assistant's text"),
    ],
)
def test_a_template_that_cannot_hold_tools_is_refused(template: str, message: str) -> None:
    plain = replace(tool_calls, system="")
    with pytest.raises(ConfigError, match=message):
        Session(plain, with_template(template), LIMITS, "Q")


IN_SMOLLM2_STYLE = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + PLAIN


def smollm2_template(name: str) -> str:
    """A template in the style of SmolLM2-135M-Instruct, or that of a folder made by recipes/hotpotqa_cpu."""
    folder = os.environ.get("SMOLLM2")
    if name == "in its style":
        return IN_SMOLLM2_STYLE
    if not folder:
        pytest.skip("SMOLLM2=DIR is not set: a folder made by recipes/hotpotqa_cpu/prepare_model.py")
    return (Path(folder) / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["in its style", "its own"])
def test_smollm2_does_not_show_tools_itself_and_runs_with_a_system_message_that_names_them(name: str) -> None:
    tokens = with_template(smollm2_template(name))
    with pytest.raises(ConfigError, match="does not show tools"):
        Session(replace(tool_calls, system=""), tokens, LIMITS, "Q")
    for written in ([PIECES[0], "<answer>x</answer>"], ["Well.", PIECES[0] * 2, "<tool_call>"]):
        check_any(tool_calls, tokens, written, ["a passage"], LIMITS)


# --- Several calls: records, candidates, correctness ------------------------------------------------------------------


class Listed:
    """Finds one passage per query and keeps the requests."""

    def __init__(self) -> None:
        self.asked: list[SearchRequest] = []
        self.opened: list[str] = []

    def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        self.opened += ids
        return [None if name == "gone" else Passage(id=name, title=name, text=f"all of {name} " * 60) for name in ids]

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        self.asked += requests
        return [[Hit(passage=Passage(id=r.query, title=r.query, text=f"about {r.query}"), score=1.0)] for r in requests]


class Scripted:
    """Writes the turn that belongs to the number of turns in its prompt."""

    def __init__(self, tokens: TokenizerCodec, turns: Sequence[str]) -> None:
        self.codec, self.turns, self.prompts = tokens, list(turns), []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        made = []
        for request in requests:
            self.prompts.append(text := self.codec.decode(request.prompt_ids))
            turn = self.turns[text.count("<|im_start|>assistant\n") - 1]
            made.append(Completion(token_ids=tuple(self.codec.encode(turn)), prompt_tokens=len(request.prompt_ids)))
        return made


def call(query: str) -> str:
    return f'<tool_call>\n{{"name": "search", "arguments": {{"query": "{query}"}}}}\n</tool_call>'


def test_several_calls_of_a_turn_are_separate_searches_and_each_can_be_gone_on_from() -> None:
    tokens, protocol, search = codec("qwen3"), PROTOCOLS["qwen3"], Listed()
    turns = [
        f"<think>t</think>{call('one')}<|im_end|>",
        f"<tool_call>broken</tool_call>{call('two')}<|im_end|>",
        f"<think>u</think>{call('two')}\n{call('three')}\n{call('four')}<|im_end|>",
        "<answer>Ann</answer><|im_end|>",
    ]
    session = Session(protocol, tokens, LIMITS, "Who?")
    agent = Scripted(tokens, turns)
    run_sessions([session], agent, search, topk=3, sampling=Sampling())  # type: ignore[arg-type]
    assert [request.history for request in search.asked] == [(), ("one",), ("one", "two"), ("one", "two", "three")]
    record = to_trajectory(session, Question(id="q", question="Who?", golden_answers=("Ann",)))
    assert record.to_dict()["schema"] == "trajectory/2" and Trajectory.from_dict(record.to_dict()) == record
    assert [(turn.turn, turn.query, turn.reasoning) for turn in record.turns] == [
        (1, "one", "t"), (2, "two", "u"), (3, "three", "u"), (4, "four", "u"),
    ]  # fmt: skip
    queries = queries_of(record, protocol)
    assert [query.prefix for query in queries] == [
        turns[0].removesuffix("<|im_end|>"),
        *(record.text[: record.text.index(call(name), record.text.index("u</think>")) + len(call(name))]
          for name in ("two", "three", "four")),
    ]  # fmt: skip
    assert [query.turn_start is None for query in queries] == [True, True, False, False]
    assert [replace(query, reasoning="").to_dict()["schema"] for query in queries] == ["candidates/1"] * 2 + [
        "candidates/2"
    ] * 2

    passages = {"p": Passage(id="p", title="p", text="the candidate")}
    store = type("Store", (), {"by_id": lambda self, name: passages[name]})()
    again, search = Scripted(tokens, turns), Listed()
    going_on = Continuations(again, search, store, protocol=protocol, limits=LIMITS, topk=3)  # type: ignore[arg-type]
    outcomes = going_on.run([(queries[2], "p")])
    assert outcomes[0].answer == "Ann" and [request.query for request in search.asked] == ["two"]
    assert search.asked[0].history == ("one",)
    (prompt,) = again.prompts
    start = tokens.decode(session.prompt_ids) + queries[2].prefix
    assert prompt.startswith(f"{start}<|im_end|>\n<|im_start|>user")
    assert prompt.removeprefix(start) == (
        '<|im_end|>\n<|im_start|>user<tool_response>\nDoc 1(Title: "two") about two\n</tool_response>'
        '<tool_response>\nDoc 1(Title: "p") the candidate\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
    )
    assert [piece.kind for piece in protocol.pieces(record)] == [
        "think", "search", "other", "information", "other", "information",
        "think", "search", "search", "search", "other", "information", "answer",
    ]  # fmt: skip


def test_going_on_with_the_passages_that_were_shown_repeats_the_ids_of_the_trajectory() -> None:
    tokens, protocol = codec("qwen3"), PROTOCOLS["qwen3"]
    turns = [f"<think>t</think>{call('one')}<|im_end|>", "<answer>Ann</answer><|im_end|>"]
    session = Session(protocol, tokens, LIMITS, "Who?")
    run_sessions([session], Scripted(tokens, turns), Listed(), topk=3, sampling=Sampling())  # type: ignore[arg-type]
    record = to_trajectory(session, Question(id="q", question="Who?", golden_answers=("Ann",)))
    (query,) = queries_of(record, protocol)
    again = Session(protocol, tokens, LIMITS, "Who?", prefix=Prefix("one", query.prefix))
    again.found([Passage(id="one", title="one", text="about one")])
    assert again.ids == session.ids[: len(again.ids)]


def test_results_that_leave_no_room_end_the_trajectory_with_the_models_turn() -> None:
    tokens = codec("qwen3")
    room = len(Session(tool_calls, tokens, LIMITS, "Who?").prompt_ids) + 160
    session = Session(tool_calls, tokens, replace(LIMITS, max_tokens=room), "Who?")
    session.model_wrote(tokens.encode(call("a") + call("b")))
    session.found([Passage(id="a", title="a", text="word " * 20)])
    assert session.found([Passage(id="b", title="b", text="word " * 90)]) == Finished(StopReason.MAX_TOKENS)
    assert session.response_mask[-1] == 1 and [turn.passages for turn in session.turns] == [(), ()]


# --- Opened documents -------------------------------------------------------------------------------------------------

OPENING = replace(tool_calls, tools=("search", "open"), passage_form="{rank} (id {id}): {text}")


def opening(document: str) -> str:
    return f'<tool_call>\n{{"name": "open", "arguments": {{"id": "{document}"}}}}\n</tool_call>'


def test_open_is_unknown_unless_the_protocol_offers_it() -> None:
    assert isinstance(tool_calls.read(opening("1"), codec("qwen3")), Malformed)
    assert OPENING.read(opening("1"), codec("qwen3")) == (Open("1"),)
    for name, protocol in PROTOCOLS.items():
        if name != "qwen3_thinking":  # its template writes a turn otherwise than its generation prompt begins
            written = replace(protocol, tools=OPENING.tools).write_open("", "7", codec(name))
            assert replace(protocol, tools=OPENING.tools).read(written, codec(name)) == (Open("7"),)
    assert '"open"' not in codec("qwen3").decode(Session(tool_calls, codec("qwen3"), LIMITS, "Q").prompt_ids)
    assert '"open"' in codec("qwen3").decode(Session(OPENING, codec("qwen3"), LIMITS, "Q").prompt_ids)


def test_a_search_may_show_the_beginning_of_passages_and_open_the_whole() -> None:
    part, passage = replace(OPENING, passage_form="{rank} {text:.9}"), Passage(id="a", title="T", text="<b>long enough")
    assert part.render([passage, passage]) == "1 ‹b>long e\n2 ‹b>long e"
    assert part.render_document(passage) == "Title: T\n‹b>long enough"


def test_documents_are_opened_by_id_or_rank_and_recorded_in_the_search_that_showed_them() -> None:
    tokens, search = codec("qwen3"), Listed()
    turns = [
        call("one"),
        opening("1") + opening("never shown"),
        f"<think>t</think>{opening('one')}{call('two')}{opening('1')}",
        "<answer>Ann</answer>",
    ]
    session = Session(OPENING, tokens, replace(LIMITS, max_document_tokens=100), "Who?")
    run_sessions([session], Scripted(tokens, turns), search, topk=3, sampling=Sampling())  # type: ignore[arg-type]
    assert search.opened == ["one", "one", "two"]
    record = to_trajectory(session, Question(id="q", question="Who?", golden_answers=("Ann",)))
    assert [(turn.query, turn.opened) for turn in record.turns] == [("one", ("one",)), ("two", ("two",))]
    assert [turn.reasoning for turn in record.turns] == ["", "t"]
    assert [passage.title for passage in session.passages_read] == ["one", "one", "one", "two", "two"]
    assert all("never shown" not in passage.text for passage in session.passages_read)
    assert Trajectory.from_dict(record.to_dict()) == record and record.to_dict()["schema"] == "trajectory/2"
    first, second, third = (segment for segment in session.segments if not segment.by_model)
    assert "1 (id one): about one" in first.text
    assert "Title: one\nall of one all of one" in second.text and "Error: no document 'never shown' was" in second.text
    assert third.text.index("Title: one") < third.text.index("1 (id two)") < third.text.index("Title: two")
    alone = Session(OPENING, tokens, LIMITS, "Who?").protocol.reply([""], (), tokens)
    assert all(len(segment.ids) <= 3 * (100 + len(tokens.encode(alone))) for segment in (second, third))
    (one, two) = queries_of(record, OPENING)
    assert one.turn_start is None and two.turn_start is not None

    assert (one.opens, two.opens, two.last_shown) == (0, 3, ("one",))
    store = type("Store", (), {"by_id": lambda self, name: Passage(id=name, title=name, text=f"candidate {name}")})()
    again, search = Scripted(tokens, turns), Listed()
    going_on = Continuations(again, search, store, protocol=OPENING, limits=LIMITS)  # type: ignore[arg-type]
    going_on.run([(two, "p"), (two, "r")])
    going_on.run([(two, "s")])
    assert search.opened == ["one"] and search.asked == [], "the earlier call of the turn is carried out again, once"
    assert len(again.prompts) == 3
    for name, prompt in zip("prs", again.prompts, strict=True):
        assert "all of one" in prompt and f"candidate {name}" in prompt


def test_a_turn_that_goes_on_from_a_prefix_opens_by_the_ranks_of_the_trajectory() -> None:
    tokens = codec("qwen3")
    turns = [call("one"), opening("1") + call("two"), "<answer>Ann</answer>"]
    session = Session(OPENING, tokens, LIMITS, "Who?")
    run_sessions([session], Scripted(tokens, turns), Listed(), topk=3, sampling=Sampling())  # type: ignore[arg-type]
    record = to_trajectory(session, Question(id="q", question="Who?", golden_answers=("Ann",)))
    two = queries_of(record, OPENING)[1]
    assert Candidates.from_dict(json.loads(json.dumps(two.to_dict()))) == two
    search = Listed()
    store = type("Store", (), {"by_id": lambda self, name: Passage(id="two", title="two", text="about two")})()
    agent = Scripted(tokens, turns)
    Continuations(agent, search, store, protocol=OPENING, limits=LIMITS).run([(two, "two")])  # type: ignore[arg-type]
    assert search.opened == ["one"]
    (prompt,) = agent.prompts
    assert prompt == tokens.decode(session.prompt_ids) + session.text.removesuffix(turns[-1])


def test_an_id_that_was_shown_wins_over_a_rank() -> None:
    tokens = codec("qwen3")
    session = Session(OPENING, tokens, LIMITS, "Who?")
    session.model_wrote(tokens.encode(call("a")))
    session.found([Passage(id=name, title=name, text="x") for name in ("2", "7", "1")])
    asked = session.model_wrote(tokens.encode("".join(map(opening, ["2", "1", "3", "7", "4"]))))
    opened = []
    while isinstance(asked, Open):
        opened.append(asked.document)
        asked = session.found([Passage(id=asked.document, title="T", text="x")])
    assert opened == ["2", "1", "1", "7"] and "Error: no document '4' was shown" in session.text


@pytest.mark.parametrize(("limit", "opened"), [(0, 0), (2, 2), (3, 2), (4, 4)])
def test_the_limit_of_opened_documents_ends_the_trajectory(limit: int, opened: int) -> None:
    tokens, search = codec("qwen3"), Listed()
    turns = [call("one"), opening("1") * 2, opening("1") + opening("none"), opening("1")]
    session = Session(OPENING, tokens, replace(LIMITS, max_opens=limit), "Who?")
    run_sessions([session], Scripted(tokens, turns), search, topk=3, sampling=Sampling())  # type: ignore[arg-type]
    assert session.finished == Finished(StopReason.MAX_TURNS)
    assert session.opens == opened and session.response_mask[-1] == 1


def marked(*marks: str) -> TokenizerCodec:
    """The tokenizer with further tokens, half of them special."""
    copy = type(tokenizer("hermes"))(
        tokenizer_object=Tokenizer.from_str(tokenizer("hermes")._tokenizer.to_str()),
        eos_token="<|im_end|>",
        chat_template=tokenizer("qwen3").chat_template,
    )
    copy.add_tokens([AddedToken(mark, special=bool(i % 2), normalized=False) for i, mark in enumerate(marks)])
    return TokenizerCodec(copy)


MARKS = ("[INST]", "[/INST]", "[TOOL_CALLS]", ">>TITLE<<", "◁think▷", "[[", "aba!", "Paris", "  ")


@settings(max_examples=80, deadline=None)
@given(
    text=st.lists(st.sampled_from([*MARKS, "[", "INST]", "ab", "a!", " ", "<|im_end|>", "<tool_call>"])).map("".join)
)
def test_no_result_can_write_a_token_that_was_added_to_the_tokenizer(text: str) -> None:
    tokens = marked(*MARKS)
    added = tokens.tokenizer.get_added_vocab()
    allowed = {added["Paris"], added["  "]}
    empty = Passage(id="", title="", text="")
    for protocol in (OPENING, compact):
        session = Session(protocol, tokens, LIMITS, "Who?")
        asked = call("a") if protocol is OPENING else "<search> a </search>"
        counts = []
        for passage in (Passage(id=text, title=text, text=text), replace(empty, id=" ")):
            session.model_wrote(tokens.encode(asked))
            session.found([passage])
            counts.append([token for token in session.segments[-1].ids if token in added.values()])
        first, second = ([token for token in found if token not in allowed] for found in counts)
        assert first == second


@pytest.mark.parametrize("name", ["qwen3_coder", "llama3"])
def test_candidates_read_trajectories_with_the_options_of_their_protocol(name: str) -> None:
    protocol, tokens = replace(PROTOCOLS[name], tools=("search", "open")), codec(name)
    options = {"call_form": protocol.call_form, "answer": protocol.answer, "tools": ["search", "open"]}
    asked = {"qwen3_coder": PIECES[2], "llama3": PIECES[1]}[name]
    session = Session(protocol, tokens, LIMITS, "Who?")
    session.model_wrote(tokens.encode(asked))
    session.found([Passage(id="a", title="a", text="x")])
    session.model_wrote(tokens.encode("<answer>Ann</answer>"))
    record = to_trajectory(session, Question(id="q", question="Who?", golden_answers=("Ann",)))
    config = CandidatesConfig(
        in_="", out="", search=SearchSpec(backend="service", url="http://127.0.0.1:9"), protocol="tool_calls"
    )
    worker = CandidatesWorker(replace(config, protocol_options=options))
    assert [query.prefix for query in queries_of(record, worker._protocol)] == [asked]
    for other in (CandidatesWorker(config)._protocol, PROTOCOLS["hermes"]):
        with pytest.raises(RecordError, match="or other options of it"):
            queries_of(record, other)


def test_a_trajectory_written_with_tags_is_no_trajectory_of_tool_calls() -> None:
    turn = Turn(turn=1, reasoning="", query="one", passages=())
    record = Trajectory(
        id="q", question="Who?", golden_answers=(), turns=(turn,), answer=None, stop_reason=StopReason.MAX_TURNS,
        em=0, f1=0.0, text="<search> one </search>",
    )  # fmt: skip
    with pytest.raises(RecordError, match="another agent protocol than 'tool_calls'"):
        queries_of(record, tool_calls)


def test_results_before_a_failed_search_of_the_same_turn_were_not_shown() -> None:
    tokens = codec("qwen3")
    session = Session(tool_calls, tokens, LIMITS, "Who?")
    session.model_wrote(tokens.encode(call("a") + call("b")))
    session.found([Passage(id="a", title="a", text="x")])
    session.search_failed()
    assert [turn.passages for turn in session.turns] == [()] and session.shown == [()]
    assert session.passages_read == []


def test_an_id_that_is_longer_than_the_limit_is_an_error_and_not_an_endless_loop() -> None:
    tokens = codec("qwen3")
    session = Session(OPENING, tokens, LIMITS, "Who?")
    session.model_wrote(tokens.encode(call("a")))
    with pytest.raises(ConfigError, match="leave its id out of passage_form"):
        session.found([Passage(id="https://a.example/" * 200, title="a", text="x")])


def test_a_document_that_the_retriever_no_longer_has_gives_a_message() -> None:
    tokens = codec("qwen3")
    session = Session(OPENING, tokens, LIMITS, "Who?")
    run_sessions(
        [session],
        Scripted(tokens, [call("gone"), opening("gone"), "<answer>x</answer>"]),  # type: ignore[arg-type]
        Listed(),  # type: ignore[arg-type]
        topk=1,
        sampling=Sampling(),
    )
    assert "Error: no document 'gone'" in session.text and session.turns[0].opened == ()


def test_a_backend_that_cannot_open_documents_is_an_error_that_says_so() -> None:
    tokens, search = codec("qwen3"), AnySearch(["x"])
    with pytest.raises(SearchError, match="AnySearch cannot open documents"):
        run_sessions(
            [Session(OPENING, tokens, LIMITS, "Who?")],
            Scripted(tokens, [call("one"), opening("1")]),  # type: ignore[arg-type]
            search,  # type: ignore[arg-type]
            topk=1,
            sampling=Sampling(),
        )
