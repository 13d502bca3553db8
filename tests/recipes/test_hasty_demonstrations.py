"""Demonstrations are trajectories that the runtime itself could have produced."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentic_r_plugin.answers import exact_match
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.protocol import Finished, Limits, Search, load_protocol
from agentic_r_plugin.records import StopReason
from agentic_r_plugin.session import Session
from agentic_r_plugin.tags import compact
from agentic_r_plugin.tools import OPEN, SEARCH
from agentic_r_plugin.world.generate import build_world
from recipes.quickstart.warm_start.demonstrations import Demonstration, Haste, Shown, demonstrations, small_world
from recipes.quickstart.warm_start.small_agent import (
    OPEN_MARKS,
    TOOL_MARKS,
    build_model,
    teach_tool_calls,
    train_tokenizer,
)
from recipes.quickstart.warm_start.train import TOOL_OPTIONS, WarmStartConfig

CAREFUL = Haste(stop_at_person=0.0, stop_at_other=0.0, guess=0.0, repeat=0.0)


@pytest.fixture(scope="module")
def codec() -> TokenizerCodec:
    texts = [passage.contents for passage in build_world(small_world(99, 12)).passages]
    return TokenizerCodec(train_tokenizer(texts, 800))


def made(codec: TokenizerCodec, haste: Haste, gold: float = 0.7) -> list[Demonstration]:
    found = demonstrations(
        codec, first_seed=5, worlds=3, per_world=24, haste=haste, shown=Shown(gold=gold), limits=Limits()
    )
    return list(found)


def test_every_demonstration_ends_answered_with_a_model_token(codec: TokenizerCodec) -> None:
    for one in made(codec, Haste()):
        assert one.session.finished is not None
        assert one.session.finished.stop_reason is StopReason.ANSWERED
        assert one.session.malformed == 0
        assert len(one.ids) == len(one.mask)
        assert one.mask[-1] == 1


def test_careful_demonstrations_that_find_everything_give_the_gold_answer(codec: TokenizerCodec) -> None:
    for one in made(codec, CAREFUL, gold=1.0):
        assert exact_match(one.session.finished.answer, one.question.golden_answers)  # type: ignore[union-attr]
        assert one.session.searches == one.question.metadata["hops"]
        assert [turn.query for turn in one.session.turns] != []


def test_replaying_the_models_tokens_gives_the_same_trajectory(codec: TokenizerCodec) -> None:
    by_seed = {seed: build_world(small_world(seed, 24)) for seed in (5, 6, 7)}
    for index, one in enumerate(made(codec, Haste())):
        passages = {passage.id: passage for passage in by_seed[5 + index // 24].passages}
        session = Session(protocol=compact, codec=codec, limits=Limits(), question=one.question.question)
        turns = iter(one.session.turns)
        for segment in one.session.segments:
            if segment.by_model:
                action = session.model_wrote(segment.ids)
                if isinstance(action, Search):
                    session.found([passages[shown.id] for shown in next(turns).passages])
                else:
                    assert isinstance(action, Finished)
        assert session.ids == one.ids
        assert session.finished == one.session.finished


def test_hasty_demonstrators_are_wrong_more_often_than_careful_ones(codec: TokenizerCodec) -> None:
    def right(haste: Haste) -> float:
        found = made(codec, haste)
        hits = [exact_match(one.session.finished.answer, one.question.golden_answers) for one in found]  # type: ignore[union-attr]
        return sum(hits) / len(hits)

    assert right(Haste()) < 0.6 < 0.75 < right(CAREFUL)


def test_a_needless_repeat_costs_a_search(codec: TokenizerCodec) -> None:
    once = sum(one.session.searches for one in made(codec, CAREFUL, gold=1.0))
    twice = sum(one.session.searches for one in made(codec, replace(CAREFUL, repeat=1.0), gold=1.0))
    assert twice > 1.5 * once


def test_demonstrations_never_exceed_the_search_limit(codec: TokenizerCodec) -> None:
    assert max(one.session.searches for one in made(codec, replace(CAREFUL, repeat=1.0))) <= Limits().max_searches


def test_demonstrators_write_elliptic_queries_and_spell_them_out_when_they_search_again(codec: TokenizerCodec) -> None:
    found = demonstrations(
        codec, first_seed=5, worlds=2, per_world=24, haste=CAREFUL, shown=Shown(gold=0.5), limits=Limits(),
        elliptic_queries=1.0,
    )  # fmt: skip
    spelled_out = 0
    for one in found:
        first, *later = [turn.query for turn in one.session.turns]
        mention = one.question.metadata["hop_mentions"][0]
        assert mention not in first
        spelled_out += bool(later) and mention in later[0]
    assert spelled_out > 10


def test_demonstrations_in_tool_calls_are_written_in_the_small_agents_chat_template() -> None:
    texts = [passage.contents for passage in build_world(small_world(99, 12)).passages]
    tokenizer = train_tokenizer(texts, 800)
    model = build_model(tokenizer, 0)
    teach_tool_calls(tokenizer, model)
    rows = model.get_input_embeddings().weight
    for mark, tag in TOOL_MARKS.items():
        (new,), (old,) = (tokenizer.encode(text, add_special_tokens=False) for text in (mark, tag))
        assert new >= 800 and rows[new].equal(rows[old])
    codec, protocol = TokenizerCodec(tokenizer), load_protocol("tool_calls", TOOL_OPTIONS)
    found = list(
        demonstrations(
            codec, first_seed=5, worlds=1, per_world=12, haste=CAREFUL, shown=Shown(gold=1.0), limits=Limits(),
            protocol=protocol,
        )
    )  # fmt: skip
    for one in found:
        session = one.session
        assert session.finished is not None and exact_match(session.finished.answer, one.question.golden_answers)
        assert (session.malformed, session.searches) == (0, one.question.metadata["hops"])
        assert all(turn.reasoning and turn.query for turn in session.turns)
        messages = [{"role": "user", "content": one.question.question}]
        for segment in session.segments:
            if segment.by_model:
                assert segment.text.endswith("<|endoftext|>")
        assert codec.decode(session.prompt_ids) == codec.chat(messages, [SEARCH], {})
        assert session.text.count("</tool_response>\n\n<think>") == session.searches


def test_demonstrators_open_what_a_search_shows_in_part_and_read_the_facts_there() -> None:
    tokenizer = train_tokenizer([passage.contents for passage in build_world(small_world(99, 12)).passages], 800)
    model = build_model(tokenizer, 0)
    teach_tool_calls(tokenizer, model)
    embedding = model.get_input_embeddings().weight[-1].clone()
    teach_tool_calls(tokenizer, model, opens=True)
    rows = model.get_input_embeddings().weight
    assert len(rows) == 800 + len(TOOL_MARKS) + len(OPEN_MARKS) and rows[-2].equal(embedding)
    codec, config = TokenizerCodec(tokenizer), WarmStartConfig(tool_calls=True, snippet=100)
    wrong = 0
    for one in demonstrations(
        codec, first_seed=5, worlds=2, per_world=24, haste=CAREFUL, shown=Shown(gold=1.0, snippet=100),
        limits=Limits(max_opens=10), protocol=config.protocol,
    ):  # fmt: skip
        session, metadata = one.session, one.question.metadata
        assert session.finished is not None and exact_match(session.finished.answer, one.question.golden_answers)
        assert session.malformed == 0
        messages = [{"role": "user", "content": one.question.question}]
        assert codec.decode(session.prompt_ids) == codec.chat(messages, [SEARCH, OPEN], {})
        by_id = {passage.id: passage for shown in session.shown for passage in shown}
        unread = list(metadata["gold_doc_ids"])
        for turn in session.turns:
            assert 1 <= len(turn.opened) <= 2
            found = turn.opened[-1] == unread[0]  # else two wrong ones were opened, and the agent searches again
            wrong += len(turn.opened) - found
            if found:
                gold = by_id[unread.pop(0)]
                assert gold.text[:100] in session.text and f"Title: {gold.title}\n" in session.text
        assert not unread
        assert session.text.count("Open ") == session.opens
    assert wrong > 5


def test_a_passage_that_does_not_state_the_fact_is_opened_in_vain() -> None:
    tokenizer = train_tokenizer([passage.contents for passage in build_world(small_world(99, 12)).passages], 800)
    teach_tool_calls(tokenizer, build_model(tokenizer, 0), opens=True)
    found = demonstrations(
        TokenizerCodec(tokenizer), first_seed=5, worlds=1, per_world=24, haste=CAREFUL,
        shown=Shown(gold=0.0, snippet=100), limits=Limits(max_opens=3),
        protocol=WarmStartConfig(tool_calls=True, snippet=100).protocol,
    )  # fmt: skip
    for one in found:
        opened = {passage for turn in one.session.turns for passage in turn.opened}
        assert opened and not opened & set(one.question.metadata["gold_doc_ids"][:1]) and one.session.opens <= 3
        assert "not found. Again." in one.session.text
