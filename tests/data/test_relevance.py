"""Relevance: the gold-document rule, the listwise judge against a real server, and what goes wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_r_plugin.backends import LLMSpec
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.judge import ask, parse_list, parse_score, parse_scores
from agentic_r_plugin.data.relevance import RelevanceConfig, run, score_candidates, task_of
from agentic_r_plugin.data.scorers.base import Resources
from agentic_r_plugin.data.scorers.gold_documents import GoldDocuments
from agentic_r_plugin.data.scorers.listwise_judge import ListwiseJudge
from agentic_r_plugin.errors import ConfigError, JudgeError, RecordError
from agentic_r_plugin.llm.openai import OpenAIBackend
from agentic_r_plugin.llm.reply import Reply
from agentic_r_plugin.records import Candidates, Passage, Question, Relevance, ScoredPassage, SubAnswer
from agentic_r_plugin.store import read_json, read_records, write_records
from tests.benchmarks.judge_replies import check, check_thoughts
from tests.data.scripted import Passages, passage
from tests.llm.loopback import Loopback, chat, serve


def query_of(
    store: Passages, text: str = "birthplace of Mara Velin", identifier: str = "q", turn: int = 1
) -> Candidates:
    return Candidates(
        id=identifier, turn=turn, question="Where was the author of Tides born?", golden_answers=("Oslo",), query=text,
        history=(), prefix="", passages=tuple(ScoredPassage(id=key, score=1.0) for key in store),
    )  # fmt: skip


# --- Gold documents ---------------------------------------------------------------------------------------------------

STORE = Passages(
    {
        item.id: item
        for item in (
            Passage(id="gold-hop", title="Tides (novel)", text="Tides was written by Mara Velin."),
            Passage(
                id="gold-named", title="Mara Velin", text="Mara Velin was born in Oslo. Her birthplace shaped her."
            ),
            Passage(id="namesake", title="Mara Quist", text="A painter."),
            Passage(id="shares", title="Nordic writers", text="Among them is Velin, whose birthplace is in dispute."),
            Passage(id="other", title="Steel", text="An alloy of iron."),
        )
    }
)


def scores_of(metadata: dict, text: str = "birthplace of Mara Velin", store: Passages = STORE) -> dict[str, int]:
    question = Question(id="q", question="Q", golden_answers=("Oslo",), metadata=metadata)
    (scored,) = score_candidates([task_of(query_of(store, text), store, question=question)], GoldDocuments())
    assert isinstance(scored, Relevance)
    return scored.scores


def test_gold_documents_fall_in_the_band_of_what_the_benchmark_knows():
    scores = scores_of({"gold_doc_ids": ["gold-hop", "gold-named"], "hop_answers": ["Mara Velin", "Oslo"]})
    bands = {key: max(score - 1, 0) // 20 for key, score in scores.items()}
    assert bands == {"gold-named": 4, "gold-hop": 3, "namesake": 2, "shares": 1, "other": 0}
    assert scores["other"] == 0


def test_the_same_documents_are_found_by_their_titles():
    scores = scores_of({"supporting_titles": ["Tides (novel)", "Mara Velin"]})
    assert [key for key, score in scores.items() if score >= 61] == ["gold-hop", "gold-named"]


def test_a_title_is_named_without_its_qualifier():
    assert scores_of({"gold_doc_ids": ["gold-hop"]}, "who wrote Tides")["gold-hop"] >= 81


def test_a_benchmark_without_gold_documents_is_an_error_that_says_what_to_do():
    with pytest.raises(RecordError, match=r"question 'q' has neither 'gold_doc_ids' nor .*listwise_judge"):
        scores_of({"level": "hard"})


WORDS = ("mara", "velin", "born", "oslo", "tides", "novel", "who", "the", "of")
words = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=20), words, st.sets(st.integers(0, 19), min_size=1))
def test_every_candidate_gets_a_score_and_gold_ones_are_above_the_threshold(drawn, text: str, gold: set[int]):
    store = Passages({str(i): Passage(id=str(i), title=title, text=body) for i, (title, body) in enumerate(drawn)})
    scores = scores_of({"gold_doc_ids": [str(number) for number in gold]}, text, store)
    assert list(scores) == list(store)
    assert {key for key, score in scores.items() if score >= 60} == {str(i) for i in gold} & set(store)
    assert all(0 <= score <= 100 for score in scores.values())


def test_the_rule_has_no_options():
    with pytest.raises(ConfigError, match="has no options; found windw"):
        GoldDocuments.build({"windw": 3}, Resources(open_judge=lambda: pytest.fail("no judge"), cost=Cost()))


# --- The judge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    ["[1, 2]", "[1, 2, 3, 4]", "[1, 2, 101]", "[1, -2, 3]", "[1, 2.5, 3]", '[1, "2.5", 3]', '[1, "two", 3]',
     "[1, true, 3]", '[1, "", 3]', "[1, null, 3]", "[1, 1e400, 3]", '[1, "²", 3]', "1, 2, 3", "[1, 2, 3", "",
     "[1] and [2, 3]", "[[1, 2, 3]]", "[9, 9, 9] then [1, 2, 3]", "[1, 2, 3]</think>",
     "[1, 2, 3] <think>[4, 5, 6]</think>"],
)  # fmt: skip
def test_a_reply_without_exactly_the_scores_asked_for_is_refused(reply: str):
    with pytest.raises(JudgeError, match="expected"):
        parse_scores(reply, 3)


@pytest.mark.parametrize(
    "reply",
    ["[1.0, 2, 3]", '[1, "2", "3.0"]', "```json\n[1, 2, 3]\n```", "<think>[9, 9, 9]</think>\n[1, 2, 3]",
     "Draft: [9, 9, 9]\n</think>\n\n[1, 2, 3]", "<Thinking>[9]</Thinking> Scores: [1, 2, 3]",
     "[THINK]so [9, 9, 9][/THINK][1, 2, 3]", "<reasoning>a</reasoning><think>[4, 4, 4]</think>[1, 2, 3]",
     "<|channel|>analysis<|message|>[9, 9, 9]<|end|><|start|>assistant<|channel|>final<|message|>[1, 2, 3]",
     "analysisWe need [9, 9, 9].assistantfinal[1, 2, 3]", "Passage [1] is near, [ 2 ] is not. [1, 2, 3]"],
)  # fmt: skip
def test_scores_are_read_after_thoughts_and_in_each_form_of_a_whole_number(reply: str):
    found = parse_scores(reply, 3)
    assert found == [1, 2, 3] and all(type(score) is int for score in found)


@pytest.mark.parametrize(
    "reply",
    ["<think>First guess: [1, 2, 3]. Let me", "[1, 2, 3]<think>or [4, 5, 6]", "<think>a</think><think>[1, 2, 3]",
     "[THINK][1, 2, 3]", "<|channel|>analysis<|message|>[1, 2, 3]", "analysisThe passages: [1, 2, 3]"],
)  # fmt: skip
def test_a_draft_within_a_thought_is_no_reply(reply: str):
    with pytest.raises(JudgeError, match="the reply ends within a thought, so it was cut; give a larger max_tokens"):
        parse_scores(reply, 3)


@pytest.mark.parametrize(
    ("reply", "score"),
    [("85", 85), ("85.0", 85), ('"85"', 85), ("```\n85\n```", 85), ("is it 3?</think>\n85", 85), ("85.5", None),
     ("<think>85", None), ("true", None), ("8 5", None), ("850", None)],
)  # fmt: skip
def test_one_score_is_read_in_each_form_of_a_whole_number(reply: str, score: int | None):
    if score is not None:
        assert parse_score(reply) == score
        return
    with pytest.raises(JudgeError):
        parse_score(reply)


class _Judge:
    """Gives replies in turn."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)

    def chat(self, prompts, *, max_tokens, temperature=0.0, seed=None):
        return [self.replies.pop(0) for _ in prompts]


def test_a_reply_that_was_cut_is_asked_for_again_and_a_plain_string_is_whole():
    cost = Cost()
    judge = _Judge(Reply("[7, 8]", cut=True), "[1, 2]")
    parse = partial(parse_scores, length=2)
    assert ask(judge, ["p"], [parse], max_tokens=9, max_retries=3, cost=cost) == [[1, 2]]
    assert cost.judge_requests == 2
    (error,) = ask(_Judge(Reply("[7, 8]", cut=True)), ["p"], [parse], max_tokens=9, max_retries=0, cost=cost)
    assert isinstance(error, JudgeError) and "the reply was cut at max_tokens=9" in str(error)


def test_half_a_character_in_a_reply_is_the_judges_error():
    assert parse_list('["caf\\ud83d\\ude00"]', 1) == ["caf\U0001f600"]
    with pytest.raises(JudgeError, match="expected a JSON list"):
        parse_list('["caf\\ud83d"]', 1)


@pytest.mark.parametrize("reply", ["[0, 50, 100]", "```json\n[0, 50, 100]\n```", "Scores: [0,50,100]."])
def test_a_list_of_scores_is_taken_from_fences_and_words_around_it(reply: str):
    assert parse_scores(reply, 3) == [0, 50, 100]


def test_a_mutated_reply_gives_exactly_the_scores_asked_for_or_a_judge_error():
    seen = check(20_000, seed=1)
    assert seen.total() == 20_000 and min(seen["refused"], seen["taken, the right ones"]) > 500


def test_a_reply_after_a_thought_gives_its_own_scores_and_a_cut_thought_none():
    assert check_thoughts(1_000, seed=2)["taken, the right ones"] == 1_000


MANY = Passages({str(number): passage(str(number)) for number in range(25)})


def shown(prompt: str) -> list[int]:
    """Passages of a prompt, from their texts."""
    return [int(number) for number in re.findall(r"text of (\d+)", prompt)]


def content(body: dict) -> str:
    return body["messages"][0]["content"]


def judged(reply: Callable[[dict], str], **options) -> tuple[list[Relevance | JudgeError], Loopback, Cost]:
    cost = Cost()
    with serve(lambda path, body: chat(reply(body))) as server:
        scorer = ListwiseJudge(OpenAIBackend(server.url, "judge"), cost=cost, **options)
        return score_candidates([task_of(query_of(MANY), MANY)], scorer), server, cost


@pytest.mark.parametrize(("window", "sizes"), [(20, [5, 20]), (10, [5, 10, 10])])
def test_a_judge_scores_windows_of_passages_together(window: int, sizes: list[int]):
    (scored,), server, cost = judged(lambda body: json.dumps(shown(content(body))), window=window)
    assert isinstance(scored, Relevance) and scored.scores == {str(number): number for number in range(25)}
    assert sorted(len(shown(content(body))) for _, body, _ in server.requests) == sizes
    assert cost.judge_requests == len(sizes)


def test_a_prompt_holds_query_passages_bands_and_number_of_scores():
    _, server, _ = judged(lambda body: json.dumps(shown(content(body))), window=25)
    (prompt,) = [content(body) for _, body, _ in server.requests]
    assert "Query: birthplace of Mara Velin\n" in prompt
    assert "[1] T 0: text of 0\n[2] T 1: text of 1\n" in prompt
    assert "exactly 25 whole numbers" in prompt and "81 to 100" in prompt and "0 to 20" in prompt
    assert "Reference answer" not in prompt and "{" not in prompt


def test_a_sub_answer_is_shown_as_reference_answer():
    with serve(lambda path, body: chat(json.dumps(shown(content(body))))) as server:
        scorer = ListwiseJudge(OpenAIBackend(server.url, "judge"))
        score_candidates([task_of(query_of(MANY), MANY, sub_answer="Oslo {x}")], scorer)
        assert all("Reference answer to the query: Oslo {x}\n" in content(body) for _, body, _ in server.requests)


def test_a_bad_reply_is_asked_for_again_with_sampling():
    def reply(body: dict) -> str:
        return "I cannot" if body["temperature"] == 0 else json.dumps(shown(content(body)))

    (scored,), server, cost = judged(reply, window=25)
    assert isinstance(scored, Relevance)
    assert [body["temperature"] for _, body, _ in server.requests] == [0.0, 0.7]
    assert cost.judge_requests == 2


def test_a_query_with_a_window_that_stays_bad_is_kept_apart_and_never_filled_up():
    def reply(body: dict) -> str:
        numbers = shown(content(body))
        return json.dumps(numbers if 0 in numbers else numbers[1:])

    (scored,), server, _ = judged(reply, max_retries=2)
    assert isinstance(scored, JudgeError) and "expected exactly 5 items, found 4" in str(scored)
    assert len(server.requests) == 1 + 3


def test_a_judge_has_no_other_options():
    resources = Resources(open_judge=lambda: OpenAIBackend("http://127.0.0.1:1", "m"), cost=Cost())
    assert ListwiseJudge.build({"window": 10}, resources).window == 10
    with pytest.raises(ConfigError, match="no option 'windw'; it has max_retries, max_tokens, preset, prompt, window"):
        ListwiseJudge.build({"windw": 10}, resources)


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [{"id": item.id, "contents": item.contents} for item in MANY.values()]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_records(tmp_path / "candidates.jsonl", [query_of(MANY, identifier=f"q{n}") for n in range(10)])
    write_records(tmp_path / "sub.jsonl", [SubAnswer(id="q3", turn=1, query="q", sub_answer="Bergen")])
    return tmp_path


def config(files: Path, **changes) -> RelevanceConfig:
    settings = {
        "candidates": str(files / "candidates.jsonl"),
        "corpus": str(files / "corpus.jsonl"),
        "out": str(files / "relevance.jsonl"),
        "scorer": "listwise_judge",
        "options": {"max_retries": 0, "window": 25},
    }
    return RelevanceConfig(**settings | changes)


def test_the_command_keeps_failed_queries_apart_and_a_resume_after_too_many_asks_for_them_again(files: Path):
    healthy = False

    def reply(path: str, body: dict):
        fine = healthy or "Bergen" not in content(body)
        return chat(json.dumps(shown(content(body))) if fine else "Not Sure")

    with serve(reply) as server:
        llm = LLMSpec(backend="openai", url=server.url, model="judge")
        asked = config(files, llm=llm, sub_answers=str(files / "sub.jsonl"), max_error_share=0.05)
        with pytest.raises(JudgeError, match=r"failed on 1 of 10 units.*q3/1: expected a JSON list of 25 items"):
            run(asked)
        lenient = config(files, llm=llm, sub_answers=str(files / "sub.jsonl"), out=str(files / "lenient.jsonl"))
        run(lenient)
        assert read_json(files / "lenient.jsonl.report.json")["errors"] == 1
        assert [record.id for record in read_records(files / "lenient.jsonl", Relevance)] == [
            f"q{number}" for number in range(10) if number != 3
        ]
        error = json.loads((files / "lenient.jsonl.errors.jsonl").read_text())
        assert error == {"unit": "q3/1", "error": "expected a JSON list of 25 items, found 'Not Sure'"}
        healthy, before = True, len(server.requests)
        run(asked, resume=True)
        assert len(server.requests) == before + 1
    assert [record.id for record in read_records(asked.out, Relevance)] == [f"q{number}" for number in range(10)]
    report = read_json(asked.out + ".report.json")
    assert (report["kept"], report["errors"], report["judge_requests"]) == (10, 0, 11)
    assert report["per_unit"]["judge_requests"] == 1.1


def test_the_gold_document_scorer_asks_for_the_questions_file(files: Path):
    with pytest.raises(ConfigError, match="gold_documents uses the benchmark's metadata; give --questions FILE"):
        run(config(files, scorer="gold_documents", options={}))
