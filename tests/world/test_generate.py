"""The generated benchmark keeps its promises for every seed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from agentic_r_plugin.answers import contains_answer
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, OutputExistsError
from agentic_r_plugin.records import CorpusLine, Passage, Question
from agentic_r_plugin.store import read_json, read_records
from agentic_r_plugin.world.generate import CAUSES, World, WorldConfig, build_world, run
from agentic_r_plugin.world.grammar import grammar
from agentic_r_plugin.world.questions import hop_query

SMALL = WorldConfig(
    people=60,
    works=40,
    companies=14,
    schools=12,
    prizes=10,
    towns=18,
    rivers=10,
    newspapers=20,
    train_questions=120,
    dev_questions=30,
    test_questions=90,
)


@pytest.fixture(scope="module", params=[0, 7])
def world(request: pytest.FixtureRequest) -> World:
    return build_world(replace(SMALL, seed=request.param))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_world(tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(replace(SMALL, seed=seed, out=str(tmp_path / folder)))
    for name in ("corpus", "train", "dev", "test"):
        first, second, other = ((tmp_path / f / "fictional_world" / f"{name}.jsonl").read_bytes() for f in "abc")
        assert first == second
        assert first != other


def test_sizes_are_the_parameters(world: World) -> None:
    assert {split: len(questions) for split, questions in world.questions.items()} == {
        "train": 120,
        "dev": 30,
        "test": 90,
    }
    hops = Counter(question.metadata["hops"] for question in world.questions["test"])
    assert hops == {1: 27, 2: 40, 3: 23}


def test_the_default_world_has_its_advertised_size() -> None:
    world = build_world(WorldConfig())
    assert 2000 <= len(world.passages) <= 2600
    assert [len(world.questions[split]) for split in ("train", "dev", "test")] == [600, 100, 300]
    words = [len(passage.text.split()) for passage in world.passages]
    assert 45 <= sum(words) / len(words) <= 75


def test_no_entity_is_in_questions_of_two_splits(world: World) -> None:
    named = {
        split: {name for question in questions for name in question.metadata["hop_subjects"]}
        for split, questions in world.questions.items()
    }
    assert not named["train"] & named["dev"]
    assert not named["train"] & named["test"]
    assert not named["dev"] & named["test"]


def test_the_gold_passage_of_each_hop_states_its_answer_under_the_right_title(world: World) -> None:
    by_id = {passage.id: passage for passage in world.passages}
    for questions in world.questions.values():
        for question in questions:
            meta = question.metadata
            assert len(meta["gold_doc_ids"]) == len(meta["hop_answers"]) == len(meta["relations"]) == meta["hops"]
            for gold, answer, subject in zip(
                meta["gold_doc_ids"], meta["hop_answers"], meta["hop_subjects"], strict=True
            ):
                assert contains_answer(by_id[gold].text, answer)
                assert by_id[gold].title == subject
            assert meta["hop_answers"][-1] == question.golden_answers[0]
            assert meta["hop_subjects"][1:] == meta["hop_answers"][:-1]


def test_a_question_names_a_thing_so_that_only_one_fits(world: World) -> None:
    for questions in world.questions.values():
        for question in questions:
            meta = question.metadata
            if meta["namesake_doc_ids"][0]:
                assert f"{meta['hop_kinds'][0]} {meta['hop_subjects'][0]}" in question.question
            for hop in range(1, meta["hops"]):
                if meta["namesake_doc_ids"][hop]:
                    assert meta["relations"][hop - 1] == "creator"


def test_no_question_is_asked_twice(world: World) -> None:
    texts = [question.question for questions in world.questions.values() for question in questions]
    assert len(texts) == len(set(texts))


def test_ids_and_passages_are_unique(world: World) -> None:
    assert len({passage.id for passage in world.passages}) == len(world.passages)
    assert len({passage.contents for passage in world.passages}) == len(world.passages)


def test_reserved_wordings_occur_in_the_test_split_alone(world: World) -> None:
    reserved = [text.partition("{")[0] for r in grammar().relations.values() for text in r.ask.reserved]
    reserved = [text for text in reserved if len(text) > 12]
    common = {text.partition("{")[0] for r in grammar().relations.values() for text in r.ask.common}
    reserved = [text for text in reserved if text not in common]
    for split in ("train", "dev"):
        for question in world.questions[split]:
            assert not any(question.question.startswith(text) for text in reserved)
    assert any(question.question.startswith(text) for question in world.questions["test"] for text in reserved)


def test_hop_queries_name_the_subject(world: World) -> None:
    for question in world.questions["test"]:
        for hop in range(question.metadata["hops"]):
            assert question.metadata["hop_mentions"][hop] in hop_query(question, hop)


def test_files_are_read_back_as_records_and_by_flashrag(tmp_path: Path) -> None:
    run(replace(SMALL, out=str(tmp_path)))
    folder = tmp_path / "fictional_world"
    assert not set(CAUSES) & set(read_json(folder / "world.json")), "as before they existed"
    questions = list(read_records(folder / "test.jsonl", Question))
    corpus = [
        Passage.from_contents(line.id, line.contents) for line in read_records(folder / "corpus.jsonl", CorpusLine)
    ]
    assert len(questions) == 90
    assert all(passage.title and passage.text for passage in corpus)
    flashrag_dataset = pytest.importorskip("flashrag.dataset.dataset")
    loaded = flashrag_dataset.Dataset(dataset_path=str(folder / "test.jsonl"))
    assert loaded.question == [question.question for question in questions]
    assert loaded.golden_answers == [list(question.golden_answers) for question in questions]


def test_existing_output_is_an_error_and_left_as_it_is(tmp_path: Path) -> None:
    config = replace(SMALL, out=str(tmp_path), train_questions=5, dev_questions=0, test_questions=0)
    run(config)
    before = (tmp_path / "fictional_world" / "corpus.jsonl").read_bytes()
    with pytest.raises(OutputExistsError, match="already exists"):
        run(replace(config, seed=1))
    run(config, resume=True)
    with pytest.raises(ManifestMismatchError, match=r"people was \d+, now .*; seed was "):
        run(replace(config, seed=1, people=SMALL.people + 1), resume=True)
    with pytest.raises(ManifestMismatchError, match=r"misleading was absent, now 0\.5"):
        run(replace(config, misleading=0.5), resume=True)
    assert (tmp_path / "fictional_world" / "corpus.jsonl").read_bytes() == before


def test_impossible_sizes_are_clear_errors_and_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make it larger"):
        run(replace(SMALL, out=str(tmp_path), test_questions=9_000))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="add up to at most 1"):
        WorldConfig(share_one_hop=0.8, share_two_hops=0.4)
    with pytest.raises(ConfigError, match="paraphrase: expected a share from 0 to 1, found 2"):
        WorldConfig(paraphrase=2)
    for name in ("", "..", "../x", "a/b"):
        with pytest.raises(ConfigError, match="name: expected the name of a folder"):
            WorldConfig(name=name)
    with pytest.raises(ConfigError, match="--out"):
        run(WorldConfig())


def test_more_works_than_there_are_titles_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the world is too large"):
        run(replace(SMALL, out=str(tmp_path), works=2000))
    assert list(tmp_path.iterdir()) == []


def test_paraphrased_facts_share_no_word_with_their_queries_and_nothing_else_changes(world: World) -> None:
    assert all(relation.oblique.common for relation in grammar().relations.values())
    seed = 0 if world == build_world(SMALL) else 7
    other = build_world(replace(SMALL, seed=seed, paraphrase=1.0))
    assert other.questions == world.questions
    assert [p.title for p in other.passages] == [p.title for p in world.passages]
    by_id = {passage.id: passage for passage in other.passages}
    for question in other.questions["dev"]:
        for gold, name in zip(question.metadata["gold_doc_ids"], question.metadata["relations"], strict=True):
            relation = grammar().relations[name]
            allowed = (*relation.oblique.common, *relation.oblique.reserved)
            patterns = [re.sub(r"\\{\w+\\}('s)?", ".+", re.escape(text)) for text in allowed]
            assert any(re.search(text, by_id[gold].text, re.IGNORECASE) for text in patterns), (name, by_id[gold].text)


def test_misleading_passages_are_added_and_state_another_value_in_the_words_of_a_query(world: World) -> None:
    seed = 0 if world == build_world(SMALL) else 7
    half, full = (build_world(replace(SMALL, seed=seed, misleading=share)) for share in (0.5, 1.0))
    count = len(world.passages)
    assert half.passages[:count] == full.passages[:count] == world.passages
    assert {p.contents for p in half.passages} <= {p.contents for p in full.passages}
    by_id = {passage.id: passage for passage in full.passages}
    kinds, right = Counter[str](), 0
    for question in full.questions["test"]:
        meta = question.metadata
        for (id,), answer, subject in zip(
            meta["misleading_doc_ids"], meta["hop_answers"], meta["hop_subjects"], strict=True
        ):
            wrong = by_id[id]
            assert subject in wrong.title and int(id) >= count
            right += contains_answer(wrong.text, answer)
            outdated = re.search("since corrected|has been disproved|well known", wrong.text)
            assert bool(outdated) == (wrong.title == subject)
            kinds["outdated" if outdated else "other"] += 1
    assert min(kinds.values()) > 0.35 * kinds.total()
    assert right < 0.05 * kinds.total(), "only where a sentence about something else names it"


def test_only_the_question_tells_homonyms_apart() -> None:
    world = build_world(replace(SMALL, homonyms=0.6))
    by_id = {passage.id: passage for passage in world.passages}
    shared = Counter[str]()
    for question in (*world.questions["train"], *world.questions["test"]):
        meta = question.metadata
        for hop, others in enumerate(meta["namesake_doc_ids"]):
            if not others:
                continue
            shared[meta["relations"][hop]] += 1
            gold, name = by_id[meta["gold_doc_ids"][hop]], meta["hop_subjects"][hop]
            assert hop_query(question, hop).count(name) == 1
            assert {by_id[other].title for other in others} == {name}
            kind = meta["hop_kinds"][hop]
            if kind:
                made = meta["relations"][hop - 1] == "creator" if hop else False
                assert made or f"{kind} {name}" in question.question or f"the {kind}, " in question.question
            else:
                (county,) = re.findall(r"county of (\w+)\.", gold.text)
                assert f"in the county of {county}" in question.question
                assert all(f"county of {county}." not in by_id[other].text for other in others)
    relations = grammar().relations
    assert {relations[name].subject for name in shared} == {"person", "work", "town"}
    hops = [others for question in world.questions["test"] for others in question.metadata["namesake_doc_ids"]]
    assert sum(map(bool, hops)) > 0.3 * len(hops)


def test_elliptic_queries_leave_out_what_the_question_says_and_a_second_query_does_not(world: World) -> None:
    seed = 0 if world == build_world(SMALL) else 7
    other = build_world(replace(SMALL, seed=seed, elliptic_queries=0.5))
    assert other.passages == world.passages
    drawn = []
    for question, plain in zip(other.questions["test"], world.questions["test"], strict=True):
        assert question.question == plain.question
        for hop, elliptic in enumerate(question.metadata["elliptic"]):
            drawn.append(elliptic)
            mention, query = question.metadata["hop_mentions"][hop], hop_query(question, hop)
            assert not elliptic or (mention not in query if hop == 0 else query == mention)
            assert elliptic or query == hop_query(plain, hop)
            assert hop_query(question, hop, 1) == hop_query(plain, hop, 1)
    assert 0.3 < sum(drawn) / len(drawn) < 0.7
