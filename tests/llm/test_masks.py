"""Models of every accepted type continue prompts here as in transformers; what cannot be run so is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from agentic_r_plugin.backends import LLMSpec, open_llm
from agentic_r_plugin.errors import BackendError, RequestRefusedError
from agentic_r_plugin.llm import masks
from agentic_r_plugin.llm.base import Sampling
from agentic_r_plugin.llm.hf_generate import HFGenerator
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.rollout import run_sessions
from agentic_r_plugin.session import Session
from agentic_r_plugin.tags import compact
from tests.llm.test_hf import checkpoint  # noqa: F401

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "num_local_experts": 4,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "ffn_dim": 48, "word_embed_proj_dim": 32,
    "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2,
}  # fmt: skip
"""Sizes by every name that the accepted types have for them; windows are shorter than the tests' sequences."""


class NoText:
    """A tokenizer for tests that stop at nothing."""

    eos_token_id = None


def tiny(kind: str) -> Any:
    default = CONFIG_MAPPING[kind]()
    sizes = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    if kind == "falcon":
        del sizes["head_dim"]  # it has no way to set it
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)).float().eval()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", sorted(masks.TESTED))
def test_two_turns_of_every_accepted_type_are_transformers_own(kind: str) -> None:
    model = tiny(kind)
    generator = HFGenerator(model, NoText(), prefix_cache_tokens=1000)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 99, (length,), generator=draw).tolist() for length in (3, 33, 20)]
    for count in (9, 4):
        found = generator.generate(prompts, max_tokens=[count] * 3, ignore_eos=True)
        assert [list(row.token_ids) for row in found] == [greedy(model, prompt, count) for prompt in prompts]
        prompts = [[*prompt, *row.token_ids, 5, 6, 7] for prompt, row in zip(prompts, found, strict=True)]


def test_a_window_changes_what_is_written() -> None:
    prompt = list(range(3, 40))
    model = tiny("mistral")
    narrow = HFGenerator(model, NoText()).generate([prompt], max_tokens=[8], ignore_eos=True)[0].token_ids
    model.config.sliding_window = None
    assert HFGenerator(model, NoText()).generate([prompt], max_tokens=[8], ignore_eos=True)[0].token_ids != narrow


def test_soft_capped_logits_are_capped() -> None:
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, attn_logit_softcapping=0.01))
    HFGenerator(model, NoText())
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4), "type bloom place tokens by ALiBi"),
        (FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True), "ALiBi"),
        (Llama4TextConfig(**SMALL, intermediate_size_mlp=48), r"layers of kind \['chunked_attention'\]"),
        (MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2), r"layers of kind \['mamba'\]"),
        (RobertaConfig(**SMALL, is_decoder=True), "type roberta do not run here as in transformers"),
    ],
)
def test_models_that_attend_otherwise_are_refused(config: Any, reason: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(BackendError, match=f"{reason}.*another backend"):
        HFGenerator(model, NoText())


def test_a_type_without_a_test_is_compared_when_it_is_loaded() -> None:
    assert "apertus" not in masks.TESTED
    found = HFGenerator(tiny("apertus"), NoText()).generate([[5, 6, 7]], max_tokens=[4], ignore_eos=True)
    assert list(found[0].token_ids) == greedy(tiny("apertus"), [5, 6, 7], 4)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


@pytest.mark.parametrize(
    ("config", "longest", "window"),
    [
        (MistralConfig(sliding_window=4096, max_position_embeddings=32_768), 32_768, 4096),
        (LlamaConfig(max_position_embeddings=2048), 2048, None),
        (LlamaConfig(max_position_embeddings=2048, **rope("dynamic", factor=2.0)), 2048, None),
        (
            Phi3Config(
                **SMALL
                | {"max_position_embeddings": 131_072, "head_dim": 96, "sliding_window": 2047}
                | {"original_max_position_embeddings": 4096}
                | rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
            ),
            4096,
            2047,
        ),
    ],
    ids=["mistral", "llama", "dynamic", "longrope"],
)
def test_windows_and_the_longest_sequence_come_from_the_configuration(config: Any, longest: int, window: Any) -> None:
    found = masks.inspect(config)
    assert (found.max_length, found.window) == (longest, window)
    with pytest.raises(BackendError, match=f"sequences of {longest + 1} tokens: this model runs {longest} at most"):
        found.require(longest + 1)


def test_trajectories_end_at_the_models_last_position_and_a_longer_prompt_is_refused(
    checkpoint: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open_llm(LLMSpec(backend="hf", model=str(checkpoint))) as llm:
        limits = Limits(max_tokens=300, max_observation_tokens=200)
        fits, too_long = (Session(compact, llm.codec, limits, question) for question in ("who?", "fox " * 250))
        run_sessions([fits, too_long], llm, None, topk=1, sampling=Sampling())  # type: ignore[arg-type]
        assert fits.refusal is None and fits.limits.max_tokens == 256 >= len(fits.ids)
        assert too_long.refusal is not None and "the model runs 256 at most" in too_long.refusal
        assert "limits.max_tokens=300, but the model runs 256 tokens at most" in capsys.readouterr().err
        refused, reply = llm.chat(["fox " * 300, "fox"], max_tokens=5)  # type: ignore[attr-defined]
    assert isinstance(refused, RequestRefusedError) and "256 at most" in str(refused)
    assert isinstance(reply, str)


def fast_tokenizer(template: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    raw = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<u>": 4}, unk_token="<u>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<u>")


@pytest.mark.parametrize(
    ("template", "expected"), [("<s> $A", [0, 2, 3]), ("<s> $A </s>", [0, 2, 3]), ("$A </s>", [2, 3]), ("$A", [2, 3])]
)
def test_a_prompt_without_chat_template_begins_as_the_tokenizer_begins_texts(template: str, expected: list[int]):
    from agentic_r_plugin.llm.codec import TokenizerCodec

    codec = TokenizerCodec(fast_tokenizer(template))
    assert codec.encode_prompt("a b") == expected
    assert codec.encode("a b") == [2, 3]  # what goes on from there gets nothing
    codec.tokenizer.chat_template = "a {{ messages[0].content }}"
    assert codec.encode_prompt("b") == [2, 3]  # a chat template writes its own beginning
    assert codec.encode_plain_prompt("a b") == expected
