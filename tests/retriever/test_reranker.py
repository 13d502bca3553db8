"""train-reranker: its labels, a real training, its resume after a kill, and what it leaves."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, OutputExistsError, RecordError, TrainingError
from agentic_r_plugin.records import Candidates, Correctness, Passage, Relevance, ScoredPassage
from agentic_r_plugin.retriever import reranker as training
from agentic_r_plugin.retriever.reranker import TrainRerankerConfig, held_out, measure, read_labelled, run, summary
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.cross_encoder import CrossEncoderReranker
from agentic_r_plugin.store import read_json, read_lines, write_records
from tests.search.tiny_retriever import make_reranker, passage_numbers, query

NUM_PASSAGES = 200  # of the fixture `corpus`


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty questions of two queries with six candidates. The fourth is correct: it alone has a word of p0 to p3."""
    folder, numbers, draw = tmp_path_factory.mktemp("data"), passage_numbers(NUM_PASSAGES), random.Random(0)
    good, bad = ([f"d{i}" for i, found in enumerate(numbers) if (found[0] < 4) is wanted] for wanted in (True, False))
    candidates, relevance, correctness = [], [], []
    for i in range(80):
        ids = draw.sample(bad, 5)
        ids.insert(3, draw.choice(good))
        key = {"id": f"q{i // 2}", "turn": 1 + i % 2}
        candidates.append(
            Candidates(
                **key, question=query(numbers[i][:1]), golden_answers=("x",), query=query(numbers[i][1:]), history=(),
                prefix="", passages=tuple(ScoredPassage(id=name, score=1.0) for name in ids),
            )
        )  # fmt: skip
        relevance.append(Relevance(**key, scores={name: 70 if name == ids[3] else 20 for name in ids}))
        correctness.append(Correctness(**key, passage_id=ids[3], em=1, answer="x", searches=0))
    write_records(folder / "candidates.jsonl", candidates)
    write_records(folder / "relevance.jsonl", relevance)
    write_records(folder / "correctness.jsonl", correctness)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return make_reranker(tmp_path_factory.mktemp("base"))


def config(data: Path, corpus: Path, base: str, out: Path, **values: object) -> TrainRerankerConfig:
    files = {name: str(data / f"{name}.jsonl") for name in ("candidates", "relevance", "correctness")}
    given = {"corpus": str(corpus), "out": str(out), "model": base, "device": "cpu", "learning_rate": 3e-3}
    return load_config(TrainRerankerConfig, values=files | given | values)


def test_correctness_comes_before_relevance_in_the_labels(tmp_path: Path):
    names = ("a", "b", "c", "d")
    queries = [
        Candidates(
            id=f"q{n}", turn=1, question="Who?", golden_answers=("x",), query="find it", history=("before",), prefix="",
            passages=tuple(ScoredPassage(id=name, score=1.0) for name in names), reasoning="why",
        )
        for n in range(4)
    ]  # fmt: skip
    write_records(tmp_path / "c.jsonl", queries)
    scores = {
        "q0": {"a": 90, "b": 70, "c": 80, "d": 5},
        "q1": dict.fromkeys(names, 40),
        "q2": {"a": 10, "b": 0, "c": 0, "d": 0},
    }
    write_records(tmp_path / "r.jsonl", [Relevance(id=key, turn=1, scores=found) for key, found in scores.items()])
    rolled_out = [("q0", "a", 0), ("q0", "c", 1), ("q1", "b", 1), ("q3", "d", 1)]
    write_records(
        tmp_path / "e.jsonl",
        [Correctness(id=key, turn=1, passage_id=name, em=em, answer=None, searches=0) for key, name, em in rolled_out],
    )
    files = {"candidates": str(tmp_path / "c.jsonl"), "corpus": "x", "out": "o"}
    both = {"relevance": str(tmp_path / "r.jsonl"), "correctness": str(tmp_path / "e.jsonl")}

    def labels(**given: str) -> tuple[dict[str, tuple[float, ...]], dict[str, int]]:
        found, left_out = read_labelled(TrainRerankerConfig(**files, **given))
        assert found[0].request == SearchRequest(query="find it", question="Who?", history=("before",), reasoning="why")
        return {item.key[0]: item.labels for item in found}, left_out

    found, left_out = labels(**both)
    assert found == {"q0": (0.9, 0.7, 1.8, 0.05), "q1": (0.4, 1.4, 0.4, 0.4), "q2": (0.1, 0, 0, 0)}
    assert left_out == {"without_scores": 1, "without_order": 0}
    found, left_out = labels(relevance=both["relevance"])
    assert list(found) == ["q0", "q2"] and left_out == {"without_scores": 1, "without_order": 1}
    found, left_out = labels(correctness=both["correctness"])
    assert found == {"q0": (0, 0, 1, 0), "q1": (0, 1, 0, 0), "q3": (0, 0, 0, 1)}
    assert left_out == {"without_scores": 1, "without_order": 0}
    with pytest.raises(ConfigError, match="give relevance=FILE, correctness=FILE, or both"):
        read_labelled(TrainRerankerConfig(**files))
    write_records(tmp_path / "r.jsonl", [Relevance(id="q0", turn=1, scores={"a": 1})])
    with pytest.raises(RecordError, match="no relevance for passage 'b'"):
        labels(**both)


def test_questions_are_held_out_whole(data, corpus, base, tmp_path):
    queries, _ = read_labelled(config(data, corpus, base, tmp_path))
    train, dev = held_out(queries, 0)
    assert (len(train), len(dev)) == (72, 8) and len({query.key[0] for query in dev}) == 4
    assert not {query.key[0] for query in dev} & {query.key[0] for query in train}
    assert held_out(queries, 0) == (train, dev) != held_out(queries, 1)
    assert held_out(queries[:2], 0) == (queries[:2], [])
    with Corpus(corpus) as texts:
        assert measure(queries, texts) == {
            "recall_at_1": 0.0, "recall_at_3": 0.0, "mrr_at_10": 0.25, "ndcg_at_10": pytest.approx(0.4307, abs=1e-4)
        }  # fmt: skip


def test_of_each_query_the_best_candidate_and_drawn_ones_below_it_are_trained_on(data, corpus, base, tmp_path):
    queries, _ = read_labelled(config(data, corpus, base, tmp_path))
    for one in queries:
        few = training.drawn(one, 3, 0)
        assert len(few.passages) == 3 and few.labels.count(1.7) == 1 and few.labels.count(0.2) == 2
        places = [one.passages.index(name) for name in few.passages]
        assert places == sorted(places) and one.passages[3] in few.passages
        assert training.drawn(one, 0, 0) == one == training.drawn(one, 9, 0)
    assert training.drawn(queries[0], 3, 0) == training.drawn(queries[0], 3, 0)
    assert len({training.drawn(one, 3, seed).passages for one in queries[:1] for seed in range(20)}) > 1
    tied = replace(queries[0], labels=(1.7, 0.2, 1.7, 1.7, 0.2, 1.7))
    few = training.drawn(tied, 5, 0)
    assert few.passages == tuple(tied.passages[place] for place in (0, 1, 4)), "others of the best label are left out"


@pytest.fixture(scope="module")
def trained(data, corpus, base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "reranker"
    run(config(data, corpus, base, out, epochs=5, batch_size=4))
    return out


def test_training_ranks_held_out_queries_better_and_says_so(trained: Path, data, corpus, base):
    done = read_json(trained / "done.json")
    assert (done["queries"], done["held_out"], done["without_order"]) == (72, 8, 0)
    measured = done["measured"]
    assert measured["retriever"]["mrr_at_10"] == 0.25
    assert measured["after"]["ndcg_at_10"] > measured["before"]["ndcg_at_10"] + 0.1
    card = (trained / "README.md").read_text()
    assert f"| ndcg_at_10 | 0.4307 | {measured['before']['ndcg_at_10']:.4f} |" in card
    assert "| labels | relevance / 100 + correctness |" in card and "`question_query`" in card
    losses = [line["loss"] for _, line in read_lines(trained / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    assert not (trained / ".work").exists()
    assert read_json(trained / "agentic_r.json") == {
        "schema": "reranker/1", "formulation": "question_query", "max_length": 64
    }  # fmt: skip
    run(config(data, corpus, base, trained, epochs=5, batch_size=4), resume=True)
    with pytest.raises(OutputExistsError):
        run(config(data, corpus, base, trained, epochs=5, batch_size=4))
    with pytest.raises(ManifestMismatchError, match="learning_rate"):
        run(config(data, corpus, base, trained, epochs=5, batch_size=4, learning_rate=1e-3), resume=True)


def test_a_reranker_that_makes_the_order_worse_is_said_to():
    def said(**figures: float) -> str:
        return summary({name: {"ndcg_at_10": value} for name, value in figures.items()})

    assert said(retriever=0.58, before=0.2, after=0.51).endswith("(recipes/retriever/prepare_ms_marco.py)")
    assert "0.582 (retriever)" in said(retriever=0.5821, before=0.2, after=0.51)
    assert said(retriever=0.5, before=0.2, after=0.6).endswith("0.600 (after)")
    assert "nothing was measured" in said()


def test_the_text_of_training_is_the_text_of_serving(trained: Path, corpus):
    reranker = CrossEncoderReranker.load(str(trained), device="cpu", precision="float32")
    read: list[tuple[str, str]] = []
    predict = reranker.model.predict
    reranker.model.predict = lambda pairs, **options: read.extend(pairs) or predict(pairs, **options)
    asked = SearchRequest(query="q1", question="q2", history=("q3",))
    passages = [Passage(id="a", title="title", text="p1 p2"), Passage(id="b", title="", text="p3")]
    reranker.score([asked], [passages])
    labelled = training.Labelled(key=("x", 1), request=asked, passages=("a", "b"), labels=(1.0, 0.0))

    class Texts:
        def by_id(self, name: str) -> Passage:
            return passages["ab".index(name)]

    columns = training._columns([labelled], Texts(), reranker)  # type: ignore[arg-type]
    assert [(columns["query"][0], text) for text in columns["passages"][0]] == read
    assert read == [("q2 [SEP] q1", "title\np1 p2"), ("q2 [SEP] q1", "p3")] and columns["labels"] == [[1.0, 0.0]]


def test_a_retriever_can_be_the_start_and_gets_a_head_from_the_seed(data, corpus, tmp_path):
    from tests.search.tiny_retriever import make_model

    start = Path(make_model(tmp_path / "start"))
    (start / "agentic_r.json").write_text('{"schema": "retriever/1", "formulation": "query"}')
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        run(config(data, corpus, str(start), out, seed=seed, batch_size=40, formulation="query"))
        assert read_json(out / "agentic_r.json")["formulation"] == "query"
        weights.append(CrossEncoderReranker.load(str(out), device="cpu").model.state_dict())
    same, other = (
        all(torch.equal(weights[0][name], weights[n][name]) for name in weights[0] if "classifier" in name)
        for n in (1, 2)
    )
    assert same and not other


def test_a_formulation_that_reads_the_reasoning_needs_some(data, corpus, base, tmp_path):
    with pytest.raises(RecordError, match=r"no query holds the agent's reasoning.*reasoning=true"):
        run(config(data, corpus, base, tmp_path / "out", formulation="reasoning_query"))


def test_a_loss_that_is_not_finite_ends_the_training(data, corpus, base, tmp_path):
    with pytest.raises(TrainingError, match=r"(loss|grad_norm) is (nan|inf)"):
        run(config(data, corpus, base, tmp_path / "out", epochs=8, learning_rate=1e30))


def test_an_interrupted_training_goes_on_and_ends_with_the_same_weights(data, corpus, base, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    given = {"epochs": 5, "batch_size": 5, "learning_rate": 1e-4}  # 75 steps
    run(config(data, corpus, base, whole, **given))
    settings = config(data, corpus, base, broken, **given)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 57:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training.Progress, "on_step_end", interrupt)
        run(settings)
    assert not (broken / "done.json").exists()
    torn = broken / ".work" / "checkpoint-56"  # as a kill while it is written leaves it
    shutil.copytree(broken / ".work" / "checkpoint-50", torn)
    (torn / "trainer_state.json").unlink()
    with pytest.raises(OutputExistsError):
        run(settings)
    run(settings, resume=True)
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    ours, theirs = (
        [(line["step"], line["loss"]) for _, line in read_lines(out / "metrics.jsonl") if "loss" in line]
        for out in (broken, whole)
    )
    assert ours == theirs and len(ours) == 7
    done, expected = (read_json(out / "done.json") for out in (broken, whole))
    assert done["measured"] == expected["measured"]
    assert done["train_loss"] == pytest.approx(expected["train_loss"])
    seconds = [line["seconds"] for _, line in read_lines(broken / "metrics.jsonl") if "loss" in line]
    assert seconds == sorted(seconds) and len(seconds) == 7


def test_the_time_of_a_resumed_training_holds_that_before_its_checkpoint():
    last = {"step": 40, "train_loss": 1.0, "train_runtime": 2.0, "train_samples_per_second": 40.0,
            "train_steps_per_second": 20.0}  # fmt: skip
    lines = [{"step": step, "loss": 3.0, "seconds": step / 5} for step in (10, 20, 30, 40)]
    *kept, found = training._with_earlier([*lines, last], 20)
    assert kept == lines
    assert (found["train_runtime"], found["train_loss"]) == (6.0, 2.5)  # 4 s before, and half of the steps
    assert (found["train_samples_per_second"], found["train_steps_per_second"]) == (13.333, 6.667)
