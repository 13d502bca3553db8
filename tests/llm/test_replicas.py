"""Several engines of one model give what one gives, and its usage; their faults are faults of this package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from agentic_r_plugin.backends import LLMSpec, open_llm
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.llm.base import Request, Sampling
from agentic_r_plugin.llm.replicas import ReplicatedBackend

AGENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "agent"
SPEC = LLMSpec(model=str(AGENT), dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def no_cluster_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    assert not ray.is_initialized()


def test_a_batch_over_two_engines_is_answered_in_order_and_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(AGENT.parent)  # paths of the settings are of the driver's folder
    prompts = ["Who was born in", "The", "A town is", "Where does", "It"]
    sampling = Sampling(temperature=1.0, seed=3)
    found = {}
    for replicas in (1, 2):
        with open_llm(replace(SPEC, model="agent", replicas=replicas)) as backend:
            assert isinstance(backend, ReplicatedBackend) is (replicas == 2)
            requests = [Request(prompt_ids=tuple(backend.codec.encode(text)), max_tokens=6) for text in prompts]
            done = backend.generate(requests, sampling)
            one = backend.generate(requests[:1], sampling)  # fewer than engines
            usage = backend.usage  # type: ignore[attr-defined]
            found[replicas] = (
                [(item.token_ids, item.prompt_tokens) for item in done + one],
                backend.chat(["hello", "you"], max_tokens=3),  # type: ignore[attr-defined]
                backend.fingerprint(),
                (usage.requests, usage.prompt_tokens, usage.generated_tokens),
                backend.max_length,  # type: ignore[attr-defined]
                backend.kept_tokens / replicas,  # type: ignore[attr-defined]
            )
    assert found[1] == found[2]
    assert found[2][4] > 0 and found[2][5] > 0
    assert found[2][3][0] == len(prompts) + 1 + 2


def test_an_engine_that_cannot_be_opened_is_our_error_and_leaves_no_cluster():
    with pytest.raises(ConfigError, match=r"nowhere"), open_llm(replace(SPEC, model="/nowhere", replicas=2)):
        pass


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"llm\.replicas: expected at least 1, found 0"):
        LLMSpec(replicas=0)
    with pytest.raises(ConfigError, match="--data-parallel-size"):
        LLMSpec(backend="openai", replicas=2)
