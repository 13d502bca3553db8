"""The shipped agent, its tokenizer, and the training that makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentic_r_plugin.errors import ConfigError, OutputExistsError
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.tags import compact
from agentic_r_plugin.world.generate import build_world
from recipes.quickstart.warm_start.demonstrations import Haste, Shown, demonstrations, small_world
from recipes.quickstart.warm_start.small_agent import END, PAD, TAGS, build_model, train_tokenizer
from recipes.quickstart.warm_start.train import WarmStartConfig, loss_of, run

SHIPPED = Path(__file__).parents[2] / "recipes" / "quickstart" / "agent"


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return train_tokenizer([passage.contents for passage in build_world(small_world(99, 12)).passages], 700)


def test_text_survives_the_tokenizer_unchanged(tokenizer: object) -> None:
    codec = TokenizerCodec(tokenizer)
    text = "Question: Où est né  Mara?\n<think> a < b </think><search> 1847 </search>\n\n<information>x</information>"
    assert codec.decode(codec.encode(text)) == text


def test_tags_are_single_ordinary_tokens_and_digits_stand_alone(tokenizer: object) -> None:
    codec = TokenizerCodec(tokenizer)
    assert all(len(codec.encode(tag)) == 1 for tag in TAGS)
    assert codec.tokenizer.convert_ids_to_tokens(codec.encode("1847")) == ["1", "8", "4", "7"]
    assert codec.tokenizer.eos_token == END and codec.tokenizer.pad_token == PAD
    assert not set(TAGS) & set(codec.tokenizer.all_special_tokens)
    assert codec.tokenizer.chat_template is None


def test_copy_heads_predict_what_followed_the_same_name_before_any_training(tokenizer: object) -> None:
    codec = TokenizerCodec(tokenizer)
    model = build_model(tokenizer, seed=0).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(20):
        run_ids = torch.randperm(600, generator=generator)[:60]
        ids = torch.cat([run_ids, run_ids[20:40]])
        with torch.no_grad():
            guess = model(ids[None]).logits[0].argmax(-1)
        hits += int((guess[62:79] == ids[63:80]).sum())
    assert hits / (20 * 17) > 0.5
    assert len(codec.encode(PAD)) == 1


def test_reading_the_tokenizer_back_gives_the_same_ids(tokenizer: object, tmp_path: Path) -> None:
    build_model(tokenizer, seed=0).save_pretrained(tmp_path)  # type: ignore[arg-type]
    tokenizer.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    before, after = TokenizerCodec(tokenizer), TokenizerCodec(AutoTokenizer.from_pretrained(tmp_path))
    for passage in build_world(small_world(98, 12)).passages[:100]:
        block = compact.render([passage])
        assert before.encode(block) == after.encode(block)


def test_a_few_steps_reduce_the_loss(tokenizer: object) -> None:
    model = build_model(tokenizer, seed=0)  # type: ignore[arg-type]
    made = demonstrations(
        TokenizerCodec(tokenizer), first_seed=5, worlds=1, per_world=12, haste=Haste(), shown=Shown(), limits=Limits()
    )
    batch = sorted(((one.ids, one.mask) for one in made), key=lambda pair: len(pair[0]))[:4]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        loss = loss_of(model, batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_tiny_warm_start_writes_a_loadable_agent_once(tmp_path: Path) -> None:
    config = WarmStartConfig(
        out=str(tmp_path / "agent"),
        worlds=1,
        per_world=4,
        tokenizer_worlds=2,
        vocabulary=700,
        one_passage_first=1.0,
        layers=3,
    )
    run(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 3
    read_back = AutoTokenizer.from_pretrained(tmp_path / "agent")
    assert len(read_back) == 700 == model.config.vocab_size
    assert read_back.eos_token_id == model.config.eos_token_id
    with pytest.raises(OutputExistsError):
        run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent"]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="worlds"):
        WarmStartConfig(worlds=0)
    with pytest.raises(ConfigError, match="tool_calls=true to open passages"):
        WarmStartConfig(snippet=100)
    with pytest.raises(ConfigError, match="layers of at least 3"):
        WarmStartConfig(layers=2)
    with pytest.raises(ConfigError, match="--out"):
        run(WarmStartConfig())


def test_what_an_agent_to_go_on_from_decides_is_not_set_again_and_it_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers=3 is for a model from scratch"):
        WarmStartConfig(init=str(SHIPPED), layers=3)
    with pytest.raises(ConfigError, match=r"init '.*nowhere': expected a folder with \*\.safetensors"):
        run(WarmStartConfig(init=str(tmp_path / "nowhere"), out=str(tmp_path / "agent")))
    assert not (tmp_path / "agent").exists()


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="no shipped weights in this checkout")
def test_the_shipped_agent_is_small_and_loads() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) <= 12 * 2**20
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert model.config.model_type == "qwen2"
    assert model.config.hidden_size // model.config.num_attention_heads == 64
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() < 4_000_000
    codec = TokenizerCodec(tokenizer)
    assert all(len(codec.encode(tag)) == 1 for tag in TAGS)
    assert tokenizer.chat_template is None
