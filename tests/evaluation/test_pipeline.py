"""The agent inside FlashRAG: real Config, get_dataset, pipeline and Evaluator on generated data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from flashrag.config import Config
from flashrag.dataset import Dataset
from flashrag.pipeline import ReasoningPipeline, SearchR1Pipeline
from flashrag.utils import get_dataset

from agentic_r_plugin import components
from agentic_r_plugin.errors import AgenticRError, ConfigError, RecordError, SearchUnavailableError
from agentic_r_plugin.evaluation.generator import AgenticGenerator
from agentic_r_plugin.evaluation.pipeline import AgenticSearchPipeline, load_split
from agentic_r_plugin.evaluation.retriever import AgenticRetriever, FlashRAGBackend
from agentic_r_plugin.evaluation.settings import read_settings
from agentic_r_plugin.protocol import AgentProtocol, Limits
from agentic_r_plugin.records import Question, Trajectory
from agentic_r_plugin.rollout import run_sessions, to_trajectory
from agentic_r_plugin.session import Session
from agentic_r_plugin.store import read_records
from agentic_r_plugin.tags import search_r1
from tests.evaluation.evaluation_toy import (
    METRIC_NAMES,
    OverlapSearch,
    RuleAgent,
    flashrag_config,
    write_benchmark,
    write_lines,
)

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluation" / "flashrag.yaml"


def build(folder: Path, agent: RuleAgent | None = None, **extra: Any) -> AgenticSearchPipeline:
    config = flashrag_config(folder, **extra)
    search = OverlapSearch(folder / "toy" / "corpus.jsonl")
    return AgenticSearchPipeline(
        config, retriever=AgenticRetriever(search), generator=AgenticGenerator(agent or RuleAgent())
    )


def test_config_get_dataset_and_pipeline_evaluate_the_toy_agent(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    pipeline = build(tmp_path, metrics=[*METRIC_NAMES, "em", "f1", "retrieval_recall"])
    pipeline.run(load_split(pipeline.config, "test"))
    result = pipeline.evaluator.result
    assert result["agentic_em"] == result["em"] == 1.0
    assert result["agentic_f1"] == result["f1"] == 1.0
    assert result["search_turns"] == 2.0
    assert result["answer_recall_at_3"] == 1.0
    assert result["answer_recall_at_3_per_turn"] == 0.5
    assert result["gold_document_recall"] == result["gold_documents_complete"] == 1.0
    assert result["gold_document_recall_at_20"] == result["answer_recall_at_20"] == 1.0
    assert result["malformed_share"] == 0.0
    assert result["retrieval_recall_top5"] == 1.0


def test_trajectories_are_those_of_the_rollout_driver(tmp_path: Path) -> None:
    home = write_benchmark(tmp_path)
    agent = RuleAgent({("Bo Rusk", 1): "no tags at all", ("Cy Venn", 0): "<search> Sarn </search>"})
    pipeline = build(tmp_path, agent)
    dataset = pipeline.run(load_split(pipeline.config, "test"))
    questions = list(read_records(home / "test.jsonl", Question))
    sessions = [Session(search_r1, agent.codec, Limits(), question.question) for question in questions]
    run_sessions(sessions, agent, OverlapSearch(home / "corpus.jsonl"), topk=3, sampling=pipeline.settings.sampling())
    expected = [to_trajectory(session, question) for session, question in zip(sessions, questions, strict=True)]
    assert [Trajectory.from_dict(item.trajectory) for item in dataset] == expected
    assert expected[1].stop_reason.value == "malformed"
    assert expected[1].malformed_turns == 3


@pytest.mark.parametrize(("reranks", "searches"), [(False, 12), (True, 24)])
def test_recall_at_20_is_of_the_agents_own_searches_with_the_same_trajectories(
    tmp_path: Path, reranks: bool, searches: int
) -> None:
    write_benchmark(tmp_path)
    outputs, scores, asked = [], [], []
    for depth in (20, 0):
        pipeline = build(tmp_path, agentic_r={"depth": depth}, metrics=[*METRIC_NAMES, "em"])
        pipeline.backend.depth_changes_order = reranks
        outputs.append([item.output for item in pipeline.run(load_split(pipeline.config, "test"))])
        scores.append(pipeline.evaluator.result)
        asked.append((len(pipeline.backend.requests), pipeline.cost.searches))
    assert asked == [(searches, 12), (12, 12)]
    deep, shallow = outputs
    for with_depth, without in zip(deep, shallow, strict=True):
        assert with_depth["trajectory"] == without["trajectory"]
        assert with_depth["retrieval_results"] == without["retrieval_results"]
        for found, turn in zip(with_depth["retrieved"], with_depth["trajectory"]["turns"], strict=True):
            assert len(found["ids"]) == 12 and found["ids"][:3] == [passage["id"] for passage in turn["passages"]]
    at_20 = {name for name in scores[0] if name.endswith("_20") or "_20_" in name}
    assert {name: scores[0][name] for name in scores[0].keys() - at_20} == {
        name: scores[1][name] for name in scores[1].keys() - at_20
    }
    assert scores[0]["gold_document_recall_at_20"] == 1.0 and scores[1]["gold_document_recall_at_20"] is None


def test_the_retriever_is_given_question_and_history(tmp_path: Path) -> None:
    write_benchmark(tmp_path, num_questions=1)
    pipeline = build(tmp_path, agentic_r={"depth": 0})
    pipeline.run(load_split(pipeline.config, "test"))
    first, second = pipeline.backend.requests
    assert first.question == second.question == "Which river runs through the town where Ada Lom lives?"
    assert (first.history, second.history) == ((), ("where Ada Lom lives",))


def test_the_last_allowed_search_is_read_before_the_answer(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    pipeline = build(tmp_path, agentic_r={"limits": {"max_searches": 2}})
    dataset = pipeline.run(load_split(pipeline.config, "test"))
    assert [item.retrieved_times for item in dataset] == [2] * 6
    assert pipeline.evaluator.result["agentic_em"] == 1.0
    strict = build(tmp_path, agentic_r={"limits": {"max_searches": 1}})
    dataset = strict.run(load_split(strict.config, "test"))
    assert {item.finish_reason for item in dataset} == {"max_turns"}
    assert strict.evaluator.result["agentic_em"] == 0.0


def test_no_answer_is_never_the_answer_none(tmp_path: Path) -> None:
    home = write_benchmark(tmp_path, num_questions=1)
    question = json.loads((home / "test.jsonl").read_text())
    write_lines(home / "test.jsonl", [question | {"golden_answers": ["None", "No valid answer found"]}])
    agent = RuleAgent({("Ada Lom", turn): "nothing" for turn in range(3)})
    pipeline = build(tmp_path, agent, metrics=["agentic_em", "agentic_f1", "em", "malformed_share"])
    item = pipeline.run(load_split(pipeline.config, "test"))[0]
    assert (item.pred, item.answer) == ("", None)
    assert pipeline.evaluator.result == {"agentic_em": 0.0, "agentic_f1": 0.0, "em": 0.0, "malformed_share": 1.0}


def test_a_metric_that_raises_is_not_swallowed(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    pipeline = build(tmp_path, metrics=["search_turns"])
    with pytest.raises(ConfigError, match="needs AgenticSearchPipeline"):
        pipeline.evaluator.evaluate(load_split(pipeline.config, "test"))


def test_an_unknown_metric_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown agentic_emm; known: .*agentic_em"):
        build(tmp_path, metrics=["agentic_emm"])


def test_a_missing_split_is_an_error_that_lists_the_files(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    config = flashrag_config(tmp_path, split=["dev"])
    assert get_dataset(config) == {"dev": None}
    with pytest.raises(ConfigError, match=r"split 'dev'.*corpus\.jsonl, test\.jsonl"):
        load_split(config, "dev")


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{broken", RecordError, r"test\.jsonl:7: expected one JSON object per line"),
        (json.dumps({"id": "x", "question": "?", "golden_answers": True}), RecordError, r":7: field 'golden_answers'"),
        (json.dumps({"id": "q0", "question": "?", "golden_answers": ["a"]}), RecordError, ":7: .*'q0' occurs twice"),
    ],
)
def test_a_bad_question_file_is_an_error_with_its_place(
    tmp_path: Path, line: str, error: type[AgenticRError], message: str
) -> None:
    home = write_benchmark(tmp_path)
    with (home / "test.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(error, match=message):
        load_split(flashrag_config(tmp_path), "test")


def test_samples_are_the_first_or_seeded_random_questions(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    assert load_split(flashrag_config(tmp_path, test_sample_num=2), "test").id == ["q0", "q1"]
    drawn = [
        load_split(flashrag_config(tmp_path, test_sample_num=3, random_sample=True, seed=seed), "test").id
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    config = flashrag_config(tmp_path, test_sample_num=3, random_sample=True, seed=2, split=["test"])
    random.seed(2)
    assert get_dataset(config)["test"].id == drawn[2]
    with pytest.raises(ConfigError, match="7 questions were asked for, it holds 6"):
        load_split(flashrag_config(tmp_path, test_sample_num=7), "test")


@pytest.mark.parametrize("random_sample", [False, True])
def test_a_split_of_any_name_gives_the_same_sample(tmp_path: Path, random_sample: bool) -> None:
    home = write_benchmark(tmp_path)
    (home / "validation.jsonl").write_bytes((home / "test.jsonl").read_bytes())
    config = flashrag_config(tmp_path, test_sample_num=3, random_sample=random_sample, seed=1)
    found, expected = (load_split(config, name).id for name in ("validation", "test"))
    assert found == expected and len(found) == 3


@pytest.mark.parametrize("key", ["topkk", "limits.max_search", "agent.modell"])
def test_an_unknown_key_below_our_settings_is_an_error(tmp_path: Path, key: str) -> None:
    write_benchmark(tmp_path)
    head, _, tail = key.partition(".")
    with pytest.raises(ConfigError, match="AgenticRSettings: key"):
        build(tmp_path, agentic_r={head: {tail: 3} if tail else 3})


def test_a_failing_search_ends_the_run_and_keeps_finished_batches(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    pipeline = build(tmp_path, agentic_r={"batch_size": 4})
    finished: dict[str, dict[str, Any]] = {}

    def keep(items: Any) -> None:
        finished.update({item.id: json.loads(json.dumps(item.output)) for item in items})
        search.fails = True

    search = _FailingSearch(tmp_path / "toy" / "corpus.jsonl")
    pipeline.backend = search
    with pytest.raises(SearchUnavailableError):
        pipeline.run(load_split(pipeline.config, "test"), on_batch=keep)
    assert list(finished) == ["q0", "q1", "q2", "q3"]
    again = build(tmp_path)
    dataset = again.run(load_split(again.config, "test"), finished=finished)
    assert again.cost.rollouts == 2
    assert [item.pred for item in dataset] == ["Awe", "Bure", "Cam", "Dee", "Exe", "Fal"]


class _FailingSearch(OverlapSearch):
    fails = False

    def search(self, requests: Any, topk: int) -> Any:
        if self.fails:
            raise SearchUnavailableError("down")
        return super().search(requests, topk)


def test_flashrags_own_pipeline_searches_with_our_retriever_and_generator(tmp_path: Path) -> None:
    """The stop string stays, so that its test `endswith("</search>")` holds."""
    write_benchmark(tmp_path)
    ours = build(tmp_path)
    stock = SearchR1Pipeline(
        ours.config,
        prompt_template=ours.prompt_template,
        retriever=ours.retriever,
        generator=AgenticGenerator(RuleAgent()),
    )
    dataset = stock.run(load_split(ours.config, "test"))
    assert [item.retrieved_times for item in dataset] == [2] * 6
    assert [item.pred for item in dataset] == ["Awe", "Bure", "Cam", "Dee", "Exe", "Fal"]


class _Speaking(RuleAgent):
    """The rule agent in the tags of another protocol."""

    def __init__(self, protocol: AgentProtocol) -> None:
        super().__init__()
        self.protocol = protocol

    def reply(self, prompt: str) -> str:
        text = super().reply(prompt)
        for theirs, tag in (("search", self.protocol.search_tag), ("answer", self.protocol.answer_tag)):
            text = text.replace(f"<{theirs}>", self.protocol.opening(tag))
            text = text.replace(f"</{theirs}>", self.protocol.closing(tag))
        return text


@pytest.mark.parametrize("name", ["search_r1_released", "r1_searcher", "simple_deep_searcher"])
def test_every_agents_protocol_runs_on_the_one_engine_with_question_and_query_as_input(
    tmp_path: Path, name: str
) -> None:
    write_benchmark(tmp_path)
    protocol = components.load("agent_protocol", name)
    pipeline = build(tmp_path, _Speaking(protocol), agentic_r={"protocol": name, "depth": 0})
    dataset = pipeline.run(load_split(pipeline.config, "test"))
    assert [item.pred for item in dataset] == ["Awe", "Bure", "Cam", "Dee", "Exe", "Fal"]
    assert [item.retrieved_times for item in dataset] == [2] * 6
    assert {request.question for request in pipeline.backend.requests} == set(dataset.question)
    assert all(protocol.opening(protocol.information_tag) in item.trajectory["text"] for item in dataset)


def test_flashrags_own_r1_searcher_pipeline_makes_the_same_searches_and_answers(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    protocol = components.load("agent_protocol", "r1_searcher")
    ours = build(tmp_path, _Speaking(protocol), agentic_r={"protocol": "r1_searcher", "depth": 0})
    stock = ReasoningPipeline(
        ours.config, prompt_template=ours.prompt_template, retriever=ours.retriever, generator=ours.generator
    )
    found, expected = (pipeline.run(load_split(ours.config, "test")) for pipeline in (ours, stock))
    for item, other in zip(found, expected, strict=True):
        assert item.pred == other.pred
        assert list(item.retrieval_results.values()) == list(other.retrieval_results.values())


def test_our_pipeline_runs_on_a_flashrag_retriever(tmp_path: Path) -> None:
    home = write_benchmark(tmp_path)
    foreign = _RepeatingRetriever(OverlapSearch(home / "corpus.jsonl"))
    pipeline = AgenticSearchPipeline(
        flashrag_config(tmp_path), retriever=foreign, generator=AgenticGenerator(RuleAgent())
    )
    assert isinstance(pipeline.backend, FlashRAGBackend)
    pipeline.run(load_split(pipeline.config, "test"))
    assert pipeline.evaluator.result["agentic_em"] == 1.0


class _RepeatingRetriever:
    """FlashRAG's habit: beyond the end of the index the last passage comes again."""

    def __init__(self, search: OverlapSearch) -> None:
        self.inner = AgenticRetriever(search)

    def batch_search(self, query: list[str], num: int, return_score: bool = False) -> Any:
        docs, scores = self.inner.batch_search(query, num, True)
        return [row + row[-1:] for row in docs], [row + row[-1:] for row in scores]


def test_more_passages_than_the_corpus_holds_are_never_repeated(tmp_path: Path) -> None:
    home = write_benchmark(tmp_path)
    retriever = AgenticRetriever(OverlapSearch(home / "corpus.jsonl"))
    docs, scores = retriever.search("Ada Lom", num=50, return_score=True)
    assert len({doc["id"] for doc in docs}) == len(docs) == len(scores) == 12
    assert docs[0] == {
        "id": "p0",
        "title": "Ada Lom",
        "text": "Ada Lom lives in Orlo.",
        "contents": '"Ada Lom"\nAda Lom lives in Orlo.',
    }


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"use_retrieval_cache": True, "retrieval_cache_path": "nowhere"}, "no cache at nowhere"),
        ({"agentic_r": {"protocol": "x"}}, "agent_protocol 'x'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_errors(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    write_benchmark(tmp_path)
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, **extra)


def test_a_parameter_the_generator_would_ignore_is_an_error() -> None:
    generator = AgenticGenerator(RuleAgent())
    with pytest.raises(ConfigError, match="repetition_penalty"):
        generator.generate("Ada Lom", repetition_penalty=1.2)
    assert generator.generate(
        ["Question: where Ada Lom lives?"], stop=["</search>"], max_tokens=200, do_sample=False
    ) == ["<think>First the town.</think><search> where Ada Lom lives </search>"]


def test_a_data_set_can_be_given_directly(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    pipeline = build(tmp_path)
    data = [{"id": 1, "question": "Which river runs through the town where Ed Pohl lives?", "golden_answers": ["exe"]}]
    pipeline.run(Dataset(pipeline.config, data=data))
    assert pipeline.evaluator.result == {"agentic_em": 1.0}


def test_the_recipe_is_a_flashrag_configuration_that_our_settings_accept() -> None:
    config = Config(str(RECIPE), {"disable_save": True})
    assert read_settings(config).search.index == "outputs/index"


def test_questions_of_flashrags_own_reader_are_answered_and_a_text_is_one_answer(tmp_path: Path) -> None:
    home = write_benchmark(tmp_path)
    rows = [json.loads(line) for line in (home / "test.jsonl").read_text().splitlines()]
    answer = rows[0]["golden_answers"][0]
    golden: list[dict[str, Any]] = [
        {"golden_answers": answer},
        {"golden_answers": [1], "choices": ["x", answer]},
        {"golden_answers": None},
    ]
    items = [rows[0] | {"id": str(number)} | change for number, change in enumerate(golden)]
    pipeline = build(tmp_path)
    data = pipeline.run(Dataset(pipeline.config, data=items), do_eval=False)
    assert [item.trajectory["em"] for item in data] == [1, 1, 0]
    pipeline.evaluator.evaluate(data)
    assert [item.output["metric_score"]["agentic_em"] for item in data] == [1.0, 1.0, None]
    asked = Dataset(pipeline.config, data=[rows[0], rows[1] | {"golden_answers": [True]}])
    with pytest.raises(RecordError, match="expected text, found bool"):
        pipeline.run(asked)
    assert asked[0].output == {}
