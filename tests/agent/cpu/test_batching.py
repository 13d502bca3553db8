"""Concurrent requests share batches, keep their own limits, and draw reproducibly."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentic_r_plugin.agent.cpu.batching import RequestBatcher, RequestSampling, parse_sampling
from agentic_r_plugin.errors import BackendError
from agentic_r_plugin.llm.hf_generate import Generated

LIMITS: dict[str, int] = {"num_prompt_tokens": 10, "max_length": 100, "response_length": 40, "total_length": 60}


class RecordingGenerator:
    """Stands where the model would: notes each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[list[int]], dict[str, Any]]] = []

    def generate(self, prompts: list[list[int]], **options: Any) -> list[Generated]:
        self.calls.append((prompts, options))
        if any(prompt == [13] for prompt in prompts):
            raise BackendError("no luck")
        return [
            Generated(token_ids=(prompt[0], limit), logprobs=None, finish_reason="length", stop_string=None)
            for prompt, limit in zip(prompts, options["max_tokens"], strict=True)
        ]


def request(**params: Any) -> RequestSampling:
    return parse_sampling({"temperature": 1.0, **params}, **LIMITS)


def serve(*requests: tuple[list[int], RequestSampling]) -> tuple[list[Any], RecordingGenerator]:
    generator = RecordingGenerator()

    async def run() -> list[Any]:
        batcher = RequestBatcher(generator, seed=1, quiet_s=0.005, max_wait_s=0.1)  # type: ignore[arg-type]
        return await asyncio.gather(*(batcher.submit(*item) for item in requests), return_exceptions=True)

    return asyncio.run(run()), generator


def test_requests_that_come_together_are_generated_together_with_their_own_limits() -> None:
    answers, generator = serve(*[([n], request(max_tokens=n + 1)) for n in range(8)])
    assert [answer.token_ids for answer in answers] == [(n, n + 1) for n in range(8)]
    assert len(generator.calls) == 1


def test_requests_with_other_sampling_parameters_go_apart() -> None:
    _, generator = serve(([1], request()), ([2], request(temperature=0.5)), ([3], request(stop="x")), ([4], request()))
    assert sorted(prompts for prompts, _ in generator.calls) == [[[1], [4]], [[2]], [[3]]]


def test_a_failed_batch_fails_its_own_requests_only() -> None:
    answers, _ = serve(([13], request()), ([2], request(temperature=0.5)))
    assert isinstance(answers[0], BackendError)
    assert answers[1].token_ids[0] == 2


def test_seeds_depend_on_prompt_and_count_not_on_company_or_order() -> None:
    def seeds(*prompts: list[int]) -> dict[tuple[int, ...], set[int]]:
        _, generator = serve(*[(prompt, request()) for prompt in prompts])
        found: dict[tuple[int, ...], set[int]] = {}
        for batch, options in generator.calls:
            for prompt, seed in zip(batch, options["seed"], strict=True):
                found.setdefault(tuple(prompt), set()).add(seed)
        return found

    first, second = seeds([5], [6], [5]), seeds([6], [5], [7], [5])
    assert len(first[(5,)]) == 2
    assert first[(5,)] == second[(5,)] and first[(6,)] == second[(6,)]


def test_a_requests_own_seed_is_its_own_whoever_comes_first() -> None:
    def seeds(*requested: int) -> dict[int, int]:
        _, generator = serve(*[([5], request(max_tokens=n, seed=n)) for n in requested])
        assert len(generator.calls) == 1
        options = generator.calls[0][1]
        return dict(zip(options["max_tokens"], options["seed"], strict=True))

    assert seeds(3, 4) == seeds(4, 3) == {3: 3, 4: 4}


def test_limits_follow_verls_vllm_server() -> None:
    assert request().max_tokens == 40
    assert parse_sampling({}, **{**LIMITS, "num_prompt_tokens": 30}).max_tokens == 30
    assert request(max_tokens=500).max_tokens == 90
    assert request(max_tokens=0).max_tokens == 1
    with pytest.raises(BackendError, match="100 tokens leaves no room"):
        parse_sampling({}, **{**LIMITS, "num_prompt_tokens": 100})


def test_parameters_are_read_from_a_copy_and_unknown_ones_refused() -> None:
    params = {"temperature": 0.3, "stop": ["</a>"], "logprobs": True, "repetition_penalty": 1.0, "top_k": 5}
    before = dict(params)
    sampling = parse_sampling(params, **LIMITS)
    assert params == before
    assert (sampling.temperature, sampling.stop, sampling.with_logprobs, sampling.top_k) == (0.3, ("</a>",), True, 5)
    for wrong in ({"repetition_penalty": 1.2}, {"logit_bias": {1: 2}}, {"n": 2}):
        with pytest.raises(BackendError, match=next(iter(wrong))):
            request(**wrong)
