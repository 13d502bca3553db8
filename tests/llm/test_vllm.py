"""What is asked of vLLM's offline interface, against a stand-in of it: vllm is not installed here.

The stand-in has the documented signatures (`LLM`, `LLM.generate`, `SamplingParams`, `RequestOutput`) and no others, so
an argument they do not know fails here. `make test-vllm` compares the stand-in's signatures with the real ones and runs
the real engine.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from agentic_r_plugin.backends import LLMSpec, open_llm
from agentic_r_plugin.errors import BackendError, ConfigError, RequestRefusedError
from agentic_r_plugin.llm.base import Continuation, Request, Sampling, row_seed
from agentic_r_plugin.llm.vllm import VLLMBackend


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] | None = None
    max_tokens: int | None = 16
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None


class Characters:
    """A tokenizer of one id a character, without a chat template."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int], skip_special_tokens: bool, **_: Any) -> str:
        return "".join(map(chr, ids))


@dataclass
class LLM:
    model: str
    tokenizer: str
    dtype: str
    enable_prefix_caching: bool
    tensor_parallel_size: int = 1
    said: str = "<search> q </search>"
    finish_reason: str = "stop"
    max_model_len: int = 100
    calls: list[tuple[list, list, bool]] = field(default_factory=list)

    @property
    def llm_engine(self) -> SimpleNamespace:
        return SimpleNamespace(model_config=SimpleNamespace(max_model_len=self.max_model_len))

    def get_tokenizer(self) -> Characters:
        return Characters()

    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], *, use_tqdm: bool) -> list:
        self.calls.append((prompts, sampling_params, use_tqdm))
        if any(len(prompt["prompt_token_ids"]) >= self.max_model_len for prompt in prompts):
            raise ValueError("a prompt is longer than the maximum model length")
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        token_ids=tuple(map(ord, self.said))[: params.max_tokens], finish_reason=self.finish_reason
                    )
                ],
                num_cached_tokens=1,
                prompt_logprobs=None
                if params.prompt_logprobs is None
                else [None, *({token: SimpleNamespace(logprob=-token)} for token in prompt["prompt_token_ids"][1:])],
            )
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.usefixtures("vllm")
def test_a_batch_goes_to_the_engine_at_once_with_prefix_caching_and_stop_strings_kept():
    spec = LLMSpec(backend="vllm", model="m", dtype="bfloat16", options={"tensor_parallel_size": 8})
    with open_llm(spec) as backend:
        assert isinstance(backend, VLLMBackend)
        engine = backend._engine
        assert (engine.enable_prefix_caching, engine.dtype, engine.tensor_parallel_size) == (True, "bfloat16", 8)
        requests = [Request(prompt_ids=(1, 2), max_tokens=50), Request(prompt_ids=(3,), max_tokens=4)]
        done = backend.generate(requests, Sampling(stop=("</search>",)))
        assert [backend.codec.decode(one.token_ids) for one in done] == ["<search> q </search>", "<sea"]
        assert [(one.prompt_tokens, one.cached_tokens) for one in done] == [(2, 1), (1, 1)]
        ((prompts, params, bar),) = engine.calls
        assert prompts == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}] and bar is False
        assert params[1] == SamplingParams(
            temperature=0.0, top_k=-1, stop=["</search>"], max_tokens=4, include_stop_str_in_output=True,
            skip_special_tokens=False,
        )  # fmt: skip
        assert (backend.usage.requests, backend.usage.prompt_tokens, backend.usage.cached_tokens) == (2, 3, 2)


@pytest.mark.usefixtures("vllm")
def test_the_likelihood_of_a_text_is_read_from_the_log_probabilities_of_the_prompt():
    backend = VLLMBackend("m", max_model_len=10)
    asked = [Continuation(prompt_ids=(1,) * length, token_ids=(4, 5)) for length in (3, 8)]
    found, refused = backend.likelihoods(asked)
    assert (found.logprobs, found.prompt_tokens, found.cached_tokens) == ((-4.0, -5.0), 5, 1)
    assert isinstance(refused, RequestRefusedError)
    ((prompts, (params,), _),) = backend._engine.calls
    assert prompts == [{"prompt_token_ids": [1, 1, 1, 4, 5]}]
    assert params == SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    assert (backend.usage.prompt_tokens, backend.usage.generated_tokens) == (5, 0)


@pytest.mark.usefixtures("vllm")
def test_a_drawn_sample_has_its_own_seed_and_chat_is_a_prompt():
    backend = VLLMBackend("m")
    assert backend.chat(["hi"], max_tokens=8, temperature=0.7, seed=3) == ["<search>"]
    ((prompts, (params,), _),) = backend._engine.calls
    assert prompts == [{"prompt_token_ids": [104, 105]}]
    assert (params.temperature, params.seed) == (0.7, row_seed(3, (104, 105)))


@pytest.mark.usefixtures("vllm")
def test_a_message_or_a_prompt_that_fills_the_context_is_refused_alone():
    backend = VLLMBackend("m", max_model_len=10)
    first, second, third = backend.chat(["hi", "x" * 10, "ho"], max_tokens=8)
    assert (first, third) == ("<search>", "<search>") and isinstance(second, RequestRefusedError)
    assert str(second) == "vllm, m: a prompt of 10 tokens leaves no room in max_model_len=10"
    assert len(backend._engine.calls) == 1
    lengths = (2, 11, 3)
    found = backend.generate([Request(prompt_ids=(1,) * length, max_tokens=5) for length in lengths], Sampling())
    assert [one.prompt_tokens for one in (found[0], found[2])] == [2, 3]
    assert isinstance(found[1], RequestRefusedError) and "a prompt of 11 tokens leaves no room" in str(found[1])


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("reason", "cut"), [("stop", False), ("length", True), ("abort", True), (None, True)])
def test_only_a_text_that_the_model_ended_is_whole(reason: str | None, cut: bool):
    backend = VLLMBackend("m", finish_reason=reason)
    assert backend.generate([Request(prompt_ids=(1,), max_tokens=50)], Sampling())[0].cut is cut


@pytest.mark.usefixtures("vllm")
def test_what_goes_wrong_is_named():
    backend = VLLMBackend("m", said="")
    with pytest.raises(BackendError, match="a prompt of 1 tokens got no continuation"):
        backend.generate([Request(prompt_ids=(1,), max_tokens=5)], Sampling())
    with pytest.raises(ConfigError, match=r"'enable_prefix_caching' is not an option; set llm\."):
        VLLMBackend("m", enable_prefix_caching=False)
    with pytest.raises(ConfigError, match=r"vllm\.LLM\('m'\).*unexpected keyword argument 'tensor_parallel'"):
        VLLMBackend("m", tensor_parallel=2)
    with pytest.raises(ConfigError, match=r"llm\.model"):
        VLLMBackend("")


class EngineDeadError(Exception):
    """As vLLM's: no RuntimeError."""


@pytest.mark.usefixtures("vllm")
def test_an_engine_that_does_not_start_or_dies_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch):
    def raising(error: Exception):
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    backend = VLLMBackend("m")
    monkeypatch.setattr(backend._engine, "generate", raising(EngineDeadError("see stack trace")), raising=False)
    with pytest.raises(BackendError, match=r"vllm, m: EngineDeadError: see stack trace; .*--resume"):
        backend.chat(["hi"], max_tokens=5)
    monkeypatch.setattr(backend._engine, "generate", raising(KeyError("ours")), raising=False)
    with pytest.raises(KeyError):
        backend.chat(["hi"], max_tokens=5)
    monkeypatch.setattr(sys.modules["vllm"], "LLM", raising(RuntimeError("Engine core initialization failed.")))
    with pytest.raises(BackendError, match=r"did not start: Engine core.*llm\.options\.gpu_memory_utilization"):
        VLLMBackend("m")


def test_without_vllm_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"agentic-r-plugin\[vllm\].*llm\.backend=openai"):
        VLLMBackend("m")
