"""The agent loop with a real model, tokenizer and retrieval service; only verl's Ray client is replaced."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.rollout_trace import RolloutTraceConfig
from verl.workers.rollout.replica import TokenOutput

from agentic_r_plugin import components
from agentic_r_plugin.agent.agent_loop import SearchAgentLoop, request_seed
from agentic_r_plugin.agent.dataset import SourcedQuestion, verl_row
from agentic_r_plugin.errors import BackendError
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.llm.hf_generate import HFGenerator
from agentic_r_plugin.records import Question
from tests import chat_templates
from tests.agent.tiny_world import LIMITS, Service, find, questions
from tests.search import loopback

PROTOCOL = components.load("agent_protocol", "compact")


def row_of(question: Question, index: int) -> dict[str, Any]:
    return verl_row(SourcedQuestion(record=question, source="towns"), index, PROTOCOL)


ROW = row_of(questions()[0], 0)


class Engine:
    """verl's client, answering in this process: with a model, or with given turns."""

    def __init__(
        self, generator: HFGenerator | None = None, turns: list[list[int]] | None = None, seed: int = 0
    ) -> None:
        self.generator, self.turns, self.seed = generator, list(turns or []), seed
        self.asked: list[dict[str, Any]] = []
        self.name = "vllm"

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> TokenOutput:
        self.asked.append({"request_id": request_id, "prompt_ids": list(prompt_ids), **sampling_params})
        if self.generator is None:
            ids = self.turns.pop(0)
            logprobs = [-float(index + 1) for index in range(len(ids))]
        else:
            seed = 1000 * self.seed + len(prompt_ids)
            (made,) = self.generator.generate(
                [prompt_ids], max_tokens=[sampling_params["max_tokens"]], stop=sampling_params["stop"],
                temperature=sampling_params["temperature"], seed=[seed], with_logprobs=True,
            )  # fmt: skip
            ids, logprobs = list(made.token_ids), list(made.logprobs or ())
        version = 4 + len(self.asked)
        return TokenOutput(
            token_ids=ids, log_probs=logprobs, extra_fields={"min_global_steps": version, "max_global_steps": version}
        )


@pytest.fixture(scope="module")
def tokenizer(agent_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(agent_dir)


def make_loop(tokenizer: Any, engine: Engine, url: str, **options: Any) -> SearchAgentLoop:
    """The loop as verl makes it: from the YAML entry, by Hydra."""
    entry = OmegaConf.create(
        {
            "_target_": "agentic_r_plugin.agent.agent_loop.SearchAgentLoop",
            "protocol": "compact",
            "limits": {"max_searches": 2, "max_malformed": 1, "max_tokens": 160, "max_response_tokens": 24,
                       "max_observation_tokens": 48},
            "retrieval_url": url,
            "topk": 1,
            **options,
        }
    )  # fmt: skip
    rollout = {"prompt_length": 64, "name": getattr(engine, "name", "vllm")}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {}})
    return hydra.utils.instantiate(
        entry,
        trainer_config=DictConfigWrap(config),
        server_manager=engine,
        tokenizer=tokenizer,
        processor=None,
        dataset_cls=RLHFDataset,
        data_config=DictConfigWrap(config.data),
        hf_model_type="qwen2",
    )


def run(tokenizer: Any, engine: Engine, url: str, row: dict[str, Any] = ROW, **options: Any) -> AgentLoopOutput:
    async def main() -> AgentLoopOutput:
        shared = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True}
        before = dict(shared)
        output = await make_loop(tokenizer, engine, url, **options).run(
            shared, **row, raw_prompt=row["prompt"], uid="u", global_steps=5, session_id=1
        )
        assert shared == before
        return output

    return asyncio.run(main())


def test_the_token_is_read_in_the_worker_and_sent_with_each_search(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = TokenizerCodec(tokenizer)
    turns = [codec.encode("<search> Ada </search>"), codec.encode("<answer> Arn </answer>")]
    monkeypatch.setenv("TOWN_TOKEN", "s3cret")
    with loopback.serving(loopback.EchoBackend(), token="s3cret") as url:
        output = run(tokenizer, Engine(turns=turns), url, retrieval_token_env="TOWN_TOKEN")
        assert (output.extra_fields["searches"], output.extra_fields["search_failed"]) == (1, 0)
        output = run(tokenizer, Engine(turns=turns), url)
        assert output.extra_fields["search_failed"] == 1
        monkeypatch.delenv("TOWN_TOKEN")
        with pytest.raises(Exception, match=r"TOWN_TOKEN is not set.*export TOWN_TOKEN before it, on every machine"):
            run(tokenizer, Engine(turns=turns), url, retrieval_token_env="TOWN_TOKEN")


def test_ids_mask_and_logprobs_are_those_of_each_writer(tokenizer: Any, service: Service) -> None:
    codec = TokenizerCodec(tokenizer)
    first = codec.encode("<think> find Ada </think><search> Ada </search>")
    last = codec.encode("<answer> Arn </answer>")
    engine = Engine(turns=[first, last])
    output = run(tokenizer, engine, service.url)
    block = codec.encode(PROTOCOL.render([find("Ada", 1)[0].passage]))
    if len(block) > LIMITS.max_observation_tokens:
        block = output.response_ids[len(first) : -len(last)]
        assert len(block) <= LIMITS.max_observation_tokens
    assert output.prompt_ids == codec.encode("Question: Where was Ada born?\n")
    assert output.response_ids == first + block + last
    assert output.response_mask == [1] * len(first) + [0] * len(block) + [1] * len(last)
    assert output.response_logprobs == (
        [-float(i + 1) for i in range(len(first))] + [0.0] * len(block) + [-float(i + 1) for i in range(len(last))]
    )
    assert engine.asked[1]["prompt_ids"] == output.prompt_ids + first + block
    assert output.extra_fields["answer"] == "Arn"
    assert output.extra_fields["em"] == 1
    assert output.extra_fields["masked_token_share"] == len(block) / len(output.response_ids)
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (5, 6)


def test_rows_of_search_r1_can_be_trained_on_as_they_are(tokenizer: Any, service: Service) -> None:
    row = {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "Answer it. Question: Where was Ada born?\n"}],
        "reward_model": {"ground_truth": {"target": ["Arn"]}},
        "extra_info": {"split": "train", "index": 0},
    }
    output = run(tokenizer, Engine(turns=[tokenizer.encode("<answer> Arn </answer>")]), service.url, row)
    assert output.prompt_ids == TokenizerCodec(tokenizer).encode("Question: Where was Ada born?\n")
    assert (output.extra_fields["em"], output.extra_fields["answer"]) == (1, "Arn")


def test_without_a_sampling_seed_the_engine_draws_freely_and_vllm_keeps_special_tokens(
    tokenizer: Any, service: Service
) -> None:
    engine = Engine(turns=[tokenizer.encode("<answer> Bel </answer>")])
    run(tokenizer, engine, service.url, seed=None)
    (asked,) = engine.asked
    assert "seed" not in asked and asked["skip_special_tokens"] is False


def test_sglang_is_asked_in_its_own_words(tokenizer: Any, service: Service) -> None:
    engine = Engine(turns=[tokenizer.encode("<answer> Bel </answer>")])
    engine.name = "sglang"
    run(tokenizer, engine, service.url, seed=3)
    (asked,) = engine.asked
    assert asked["no_stop_trim"] is True and asked["sampling_seed"] == request_seed(3, 5, 0, 1, 0)
    # what is left goes into SGLang's SamplingParams, which refuses a name it does not know; verl takes out the last two
    assert set(asked) - {"request_id", "prompt_ids", "no_stop_trim", "sampling_seed"} == {
        "temperature", "top_p", "top_k", "stop", "max_tokens", "logprobs",
    }  # fmt: skip


def test_every_turn_asks_for_stop_strings_its_budget_and_the_same_session(tokenizer: Any, service: Service) -> None:
    codec = TokenizerCodec(tokenizer)
    engine = Engine(turns=[codec.encode("<search> Bo </search>"), codec.encode("<answer> Bel </answer>")])
    output = run(tokenizer, engine, service.url, seed=3)
    for asked in engine.asked:
        assert asked["stop"] == ["</search>", "</answer>"]
        assert asked["include_stop_str_in_output"] is True
        assert asked["max_tokens"] == min(24, 160 - len(asked["prompt_ids"]))
        assert "seed" in asked and "no_stop_trim" not in asked
    assert len({asked["request_id"] for asked in engine.asked}) == 1
    assert [asked["seed"] for asked in engine.asked] == [request_seed(3, 5, 0, 1, 0), request_seed(3, 5, 0, 1, 2)]
    assert output.num_turns == 4


def test_an_answer_inside_a_passage_does_not_count(tokenizer: Any, service: Service) -> None:
    codec = TokenizerCodec(tokenizer)
    engine = Engine(turns=[codec.encode("<search> Ada </search>"), [5, 6], [7]])
    output = run(tokenizer, engine, service.url, limits={"max_malformed": 0, "max_observation_tokens": 200})
    assert output.extra_fields["stop_reason"] == "malformed"
    assert output.extra_fields["answer"] is None
    assert "‹answer> Cor ‹/answer>" in output.extra_fields["trajectory"]["text"]


def test_a_failed_search_ends_the_trajectory_and_masks_all_of_it(tokenizer: Any, service: Service) -> None:
    codec = TokenizerCodec(tokenizer)
    service.refuse_every = 1
    try:
        output = run(tokenizer, Engine(turns=[codec.encode("<search> Ada </search>")]), service.url)
    finally:
        service.refuse_every = 0
    assert output.extra_fields["stop_reason"] == "search_failed"
    assert output.extra_fields["search_failed"] == 1
    assert output.response_mask == [0] * len(output.response_ids)
    assert "<information>" not in output.extra_fields["trajectory"]["text"]


def test_sampled_trajectories_keep_within_all_limits_and_end_with_the_model(
    agent_dir: Path, tokenizer: Any, service: Service
) -> None:
    generator = HFGenerator(AutoModelForCausalLM.from_pretrained(agent_dir), tokenizer)
    searched = malformed = 0
    for index, question in enumerate(questions() * 4):
        engine = Engine(generator, seed=index)
        output = run(tokenizer, engine, service.url, row_of(question, index))
        assert len(output.prompt_ids) + len(output.response_ids) <= LIMITS.max_tokens
        assert len(output.response_mask) == len(output.response_ids) == len(output.response_logprobs or ())
        assert output.response_mask[-1] == 1
        assert sum(output.response_mask) == output.extra_fields["generated_tokens"]
        assert all((logprob == 0) == (mask == 0) for logprob, mask in zip(
            output.response_logprobs or (), output.response_mask, strict=True))  # fmt: skip
        for asked in engine.asked:
            whole = output.prompt_ids + output.response_ids
            assert whole[: len(asked["prompt_ids"])] == asked["prompt_ids"]
        searched += output.extra_fields["searches"]
        malformed += output.extra_fields["malformed_turns"]
    assert searched > 0
    assert malformed > 0


def test_an_engine_that_returns_nothing_is_an_error(tokenizer: Any, service: Service) -> None:
    with pytest.raises(BackendError, match="no tokens"):
        run(tokenizer, Engine(turns=[[]]), service.url)


def test_a_service_that_is_busy_for_a_while_is_asked_again(tokenizer: Any, service: Service) -> None:
    codec = TokenizerCodec(tokenizer)
    turns = [codec.encode("<search> Bo </search>"), codec.encode("<answer> Bel </answer>")]
    service.queries.clear()
    service.busy = 2
    output = run(tokenizer, Engine(turns=turns), service.url, search_retries=2)
    assert output.extra_fields["stop_reason"] == "answered"
    assert service.queries == ["Bo"] * 3


def test_after_its_retries_a_search_has_failed_and_nothing_is_trained_on(tokenizer: Any, service: Service) -> None:
    codec = TokenizerCodec(tokenizer)
    service.queries.clear()
    service.busy = 100
    try:
        output = run(tokenizer, Engine(turns=[codec.encode("<search> Bo </search>")]), service.url, search_retries=1)
    finally:
        service.busy = 0
    assert service.queries == ["Bo"] * 2
    assert (output.extra_fields["stop_reason"], output.extra_fields["trained_tokens"]) == ("search_failed", 0)


def test_without_masking_also_what_the_environment_wrote_is_trained_on(tokenizer: Any, service: Service) -> None:
    codec = TokenizerCodec(tokenizer)
    turns = [codec.encode("<search> Bo </search>"), codec.encode("<answer> Bel </answer>")]
    output = run(tokenizer, Engine(turns=turns), service.url, mask_observations=False)
    assert output.response_mask == [1] * len(output.response_ids)
    assert output.extra_fields["trained_tokens"] == len(output.response_ids) > output.extra_fields["generated_tokens"]


def test_no_more_searches_than_allowed_are_under_way_at_once(tokenizer: Any, service: Service) -> None:
    codec = TokenizerCodec(tokenizer)

    async def main() -> list[AgentLoopOutput]:
        loops = []
        for _ in range(8):
            turns = [codec.encode("<search> Bo </search>"), codec.encode("<answer> Bel </answer>")]
            loop = make_loop(tokenizer, Engine(turns=turns), service.url, max_concurrent_searches=3)
            loops.append(loop.run({"temperature": 1.0}, **ROW))
        return await asyncio.gather(*loops)

    service.slow_s, service.most_at_once = 0.05, 0
    try:
        outputs = asyncio.run(main())
    finally:
        service.slow_s = 0.0
    assert [output.extra_fields["em"] for output in outputs] == [0] * 8
    assert service.most_at_once == 3


class Remote:
    """A method of a Ray actor, answering in this process."""

    def __init__(self, answer: Any) -> None:
        self.remote = answer


class AbortingServer:
    """Writes a turn in two pieces: verl's trainer aborts the first and hands over new weights in between."""

    def __init__(self, turns: list[list[int]], aborted_after: int = 5) -> None:
        self.left, self.aborted_after = [list(turn) for turn in turns], aborted_after
        self.asked: list[dict[str, Any]] = []
        self.version = 7
        self.generate = Remote(self._generate)

    async def _generate(self, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        self.asked.append({"prompt_ids": list(prompt_ids), **sampling_params})
        turn, first = self.left[0], len(self.asked) == 1
        piece = turn[: self.aborted_after] if first else turn
        output = TokenOutput(
            token_ids=piece, log_probs=[-1.0] * len(piece), stop_reason="aborted" if first else "completed",
            extra_fields={"global_steps": self.version},
        )  # fmt: skip
        self.left[0] = turn[len(piece) :]
        if first:
            self.version += 1
        else:
            self.left.pop(0)
        return output


def test_a_turn_that_verls_asynchronous_trainer_interrupts_goes_on_token_for_token(
    tokenizer: Any, service: Service
) -> None:
    codec = TokenizerCodec(tokenizer)
    first, last = codec.encode("<search> Bo </search>"), codec.encode("<answer> Bel </answer>")
    server = AbortingServer([first, last])
    output = run(tokenizer, client_of(server), service.url)
    assert output.response_ids[: len(first)] == first and output.response_ids[-len(last) :] == last
    assert server.asked[1]["prompt_ids"] == output.prompt_ids + first[:5]
    assert server.asked[1]["max_tokens"] == server.asked[0]["max_tokens"] - 5
    assert sum(output.response_mask) == len(first) + len(last)
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (7, 8)
    assert output.extra_fields["answer"] == "Bel"


def test_what_is_written_after_a_stop_string_that_an_abort_cut_in_two_is_taken_away(
    tokenizer: Any, service: Service
) -> None:
    codec = TokenizerCodec(tokenizer)
    query, last = codec.encode("<search> Bo </search>"), codec.encode("<answer> Bel </answer>")
    if len(codec.encode("</search>")) == 1:
        query = [*codec.encode("<search> Bo "), *(item for char in "</search>" for item in codec.encode(char))]
    invented = codec.encode("<information> Bo lies in Bel </information>")
    server = AbortingServer([query + invented, last], aborted_after=len(query) - 1)
    output = run(tokenizer, client_of(server), service.url)
    assert "".join(segment["text"] for segment in output.extra_fields["segments"][:1]) == codec.decode(query)
    assert output.response_ids[: len(query)] == query
    assert sum(output.response_mask) == len(query) + len(last)
    assert output.response_logprobs is not None and len(output.response_logprobs) == len(output.response_ids)


def client_of(server: AbortingServer) -> Any:
    """verl's client of the asynchronous trainers, which goes on where a request was aborted."""
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient

    async def acquire(**_: Any) -> tuple[str, Any]:
        return "server", server

    async def fields() -> list[str]:
        return []

    balancer = type("Balancer", (), {})()
    balancer.acquire_server, balancer.release_server = Remote(acquire), Remote(lambda **_: None)
    balancer.require_acquire_fields = balancer.require_release_fields = Remote(fields)
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": "vllm", "response_length": 9}}})
    return FullyAsyncLLMServerClient(config, balancer)  # type: ignore[arg-type]


def test_a_reward_is_summed_from_what_the_trajectory_showed_and_zero_where_its_search_failed(
    tokenizer: Any, service: Service
) -> None:
    codec = TokenizerCodec(tokenizer)
    turns = [codec.encode("<think> find Ada </think><search> Ada </search>"), codec.encode("<answer> Arn </answer>")]
    weights = {"exact_match": 1.0, "retrieval_credit": 0.5, "search_penalty": 0.25}
    limits = vars(LIMITS) | {"max_tokens": 400, "max_observation_tokens": 200}
    fields = run(tokenizer, Engine(turns=turns), service.url, reward=weights, limits=limits).extra_fields
    (format,) = (
        run(tokenizer, Engine(turns=turns), service.url, reward={"format": 1.0}).extra_fields["reward_parts"].values()
    )
    assert format == 1.0
    assert fields["reward_parts"] == {"exact_match": 1.0, "retrieval_credit": 1.0, "search_penalty": -1.0}
    assert (fields["reward"], fields["reward_weights"]) == (1.25, weights)
    cut = run(tokenizer, Engine(turns=turns), service.url, reward=weights).extra_fields
    assert cut["reward_parts"]["retrieval_credit"] == 0.0, "the answer was cut off with the end of the passage"
    failed = run(tokenizer, Engine(turns=turns), "http://127.0.0.1:9", reward=weights, search_retries=0).extra_fields
    assert (failed["reward"], set(failed["reward_parts"])) == (0.0, set(weights))
    alone = run(tokenizer, Engine(turns=turns), service.url).extra_fields
    assert alone["reward"] == 1.0 and not {"reward_weights", "reward_parts"} & alone.keys()


def test_an_agent_that_calls_tools_keeps_ids_mask_and_logprobs_and_opens_documents() -> None:
    tokens = chat_templates.codec("qwen3")
    options = {"tools": ["search", "open"], "template_arguments": {"enable_thinking": False}}
    limits = {"max_searches": 4, "max_malformed": 1, "max_tokens": 2000, "max_response_tokens": 400}
    call = '<tool_call>\n{"name": "%s", "arguments": {"%s": "%s"}}\n</tool_call>'
    turns = [
        tokens.encode(call % ("search", "query", "a") + call % ("search", "query", "b") + "<|im_end|>"),
        tokens.encode("<think>Read it.</think>" + call % ("open", "id", "0")),
        tokens.encode("<answer>Arn</answer><|im_end|>"),
    ]
    engine = Engine(turns=turns)
    with loopback.serving(loopback.EchoBackend()) as url:
        output = run(tokens.tokenizer, engine, url, protocol="tool_calls", protocol_options=options, limits=limits)
    kept = [token for token, mask in zip(output.response_ids, output.response_mask, strict=True) if mask]
    assert kept == [token for turn in turns for token in turn]
    begin = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    text = tokens.decode(output.prompt_ids + output.response_ids)
    assert text.count(begin) == 3 and tokens.decode(output.prompt_ids).endswith(
        f"Where was Ada born?<|im_end|>\n{begin}"
    )
    question = "Where was Ada born?"
    assert text.endswith(
        f'<|im_start|>user<tool_response>\nDoc 1(Title: "T0") {question}|()|a\n</tool_response><tool_response>\n'
        f"Doc 1(Title: \"T0\") {question}|('a',)|b\n</tool_response><|im_end|>\n{begin}"
        f"<think>Read it.</think>{call % ('open', 'id', '0')}<|im_end|>\n<|im_start|>user<tool_response>\n"
        f"Title: T0\nall of 0\n</tool_response><|im_end|>\n{begin}<answer>Arn</answer><|im_end|>"
    )
    fields = output.extra_fields
    assert (fields["em"], fields["searches"], fields["malformed_turns"]) == (1, 2, 0)
    assert [turn["opened"] for turn in fields["trajectory"]["turns"] if "opened" in turn] == [["0"]]
    logprobs = [value for value, mask in zip(output.response_logprobs, output.response_mask, strict=True) if mask]
    assert logprobs == [-float(i + 1) for turn in turns for i in range(len(turn))]
    assert all(
        value == 0 for value, mask in zip(output.response_logprobs, output.response_mask, strict=True) if not mask
    )
    assert [asked["stop"] for asked in engine.asked] == [[], [], []]


class Recorder:
    """A client with the interface that verl uses of trackio."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, dict[str, Any]]] = []

    def Trace(self, messages: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
        return metadata

    def log(self, values: dict[str, Any], step: int | None) -> None:
        self.logged += values.items()


def test_verls_own_tracing_sees_trajectories_and_searches_and_is_off_by_default(tokenizer: Any) -> None:
    codec = TokenizerCodec(tokenizer)
    turns = [codec.encode("<search> Ada </search>"), codec.encode("<answer> Arn </answer>")]
    recorder = Recorder()
    trace = RolloutTraceConfig.get_instance()
    with loopback.serving(loopback.EchoBackend()) as url:
        plain = run(tokenizer, Engine(turns=turns), url)
        assert RolloutTraceConfig.get_backend() is None
        try:
            trace.backend, trace.client, trace.token2text, trace.experiment_name = "trackio", recorder, True, "x"
            output = run(tokenizer, Engine(turns=turns), url)
        finally:
            RolloutTraceConfig.reset()
    assert (output.response_ids, output.response_mask) == (plain.response_ids, plain.response_mask)
    assert [name for name, _ in recorder.logged] == [
        "rollout_trace/SearchAgentLoop._search",
        "rollout_trace/SearchAgentLoop.run",
    ]
    assert "Ada" in str(recorder.logged[0][1]["inputs"]) and "T0" in str(recorder.logged[0][1]["output"])
    assert recorder.logged[1][1]["output"]["response_text"].endswith("<answer> Arn </answer>")
