"""The Hugging Face backend: what the data stages rely on. Generation itself is tested with the generator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from agentic_r_plugin.backends import LLMSpec, open_llm
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.llm.base import Request, Sampling, row_seed
from agentic_r_plugin.llm.hf import HFBackend


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    raw.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backend(checkpoint: Path) -> HFBackend:
    return HFBackend(checkpoint)


def requests(backend: HFBackend, *texts: str, max_tokens: int = 12) -> list[Request]:
    return [Request(prompt_ids=tuple(backend.codec.encode(text)), max_tokens=max_tokens) for text in texts]


def test_greedy_continuations_are_transformers_own(backend: HFBackend, checkpoint: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    asked = requests(backend, "the quick", "the lazy dog jumps over", "fox")
    done = backend.generate(asked, Sampling())
    for request, completion in zip(asked, done, strict=True):
        ids = torch.tensor([request.prompt_ids])
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert list(completion.token_ids) == wanted
        assert completion.prompt_tokens == len(request.prompt_ids)


def test_every_row_keeps_to_its_own_limit(backend: HFBackend):
    asked = [Request(prompt_ids=(5, 6, 7), max_tokens=limit) for limit in (1, 3, 9)]
    assert [len(done.token_ids) for done in backend.generate(asked, Sampling())] == [1, 3, 9]


def test_what_is_drawn_depends_on_the_prompt_and_seed_and_not_on_the_batch(backend: HFBackend):
    sampling = Sampling(temperature=1.0, seed=5)
    together = backend.generate(requests(backend, "the quick", "fox", "lazy"), sampling)
    alone = [backend.generate(requests(backend, text), sampling)[0] for text in ("the quick", "fox", "lazy")]
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]
    other = backend.generate(requests(backend, "fox"), Sampling(temperature=1.0, seed=6))
    assert other[0].token_ids != together[1].token_ids
    assert row_seed(5, [1, 2]) == row_seed(5, (1, 2)) != row_seed(6, [1, 2])


def test_a_chat_reply_is_the_decoded_continuation(backend: HFBackend):
    (reply,) = backend.chat(["the quick"], max_tokens=6)
    (done,) = backend.generate(requests(backend, "the quick", max_tokens=6), Sampling())
    assert reply == backend.codec.tokenizer.decode(list(done.token_ids), skip_special_tokens=True)
    assert reply.cut and done.cut, "it was stopped at its six tokens"


def test_the_fingerprint_follows_weights_and_tokenizer(backend: HFBackend, checkpoint: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert HFBackend(copy).fingerprint() == backend.fingerprint()
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert HFBackend(copy).fingerprint() != backend.fingerprint()


def test_settings_reach_the_model(checkpoint: Path):
    spec = LLMSpec(model=str(checkpoint), dtype="bfloat16", device="cpu", max_batch_tokens=99, prefix_cache_tokens=0)
    with open_llm(spec) as made:
        assert isinstance(made, HFBackend)
        assert made._generator.model.dtype == torch.bfloat16
        assert made._generator.max_batch_tokens == 99


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("", {}, "expected a model, found nothing; give llm.model=FOLDER"),
        ("/nowhere", {}, r"llm.model='/nowhere'"),
        (None, {"dtype": "int4"}, r"llm\.dtype='int4': expected one of auto, float32"),
    ],
)
def test_what_cannot_be_loaded_is_said(checkpoint: Path, model: str | None, settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        HFBackend(checkpoint if model is None else model, **settings)


def test_a_directory_without_a_model_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a checkpoint that transformers can load"):
        HFBackend(tmp_path)
