"""Supervised warm start with a tiny model: only the agent's tokens are learnt, and a stopped run goes on exactly."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agentic_r_plugin.backends import SearchSpec
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, OutputExistsError, TrainingError
from agentic_r_plugin.evaluation.settings import read_agent_card
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.retriever.reranker import Progress
from agentic_r_plugin.storage.claim import locked
from recipes.hotpotqa_cpu.warm_start import train as warm_start_sft
from recipes.hotpotqa_cpu.warm_start.demonstrations import DemonstrationSettings
from recipes.hotpotqa_cpu.warm_start.supervised import Example, FineTuneSettings, fine_tune, learning_rate, token_loss
from recipes.hotpotqa_cpu.warm_start.train import WarmStartSFTConfig

SETTINGS = FineTuneSettings(epochs=1, batch_size=2, learning_rate=1e-2, precision="float32", save_every_steps=2)
EXAMPLES = [Example(ids=tuple(range(start, start + 12)), mask=(0,) * 6 + (1,) * 6) for start in range(8)]


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=2048,
        )
    )  # fmt: skip


def test_the_loss_is_the_cross_entropy_of_the_agents_tokens_alone() -> None:
    model, example = _model().eval(), EXAMPLES[0]
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([example.ids])).logits[0].float()
        found = token_loss(model, example, precision="float32")
    expected = -sum(
        float(logits_TV[place - 1].log_softmax(-1)[example.ids[place]])
        for place in range(1, len(example.ids))
        if example.mask[place]
    )
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    log = fine_tune(_model(), [EXAMPLES] * 8, SETTINGS, seed=0, folder=tmp_path)
    assert [line["step"] for line in log] == list(range(1, 33))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    rates = [learning_rate(SETTINGS, step, 32) for step in range(32)]
    assert [line["learning_rate"] for line in log] == rates


def test_a_step_is_that_of_a_plain_loop_over_the_tokens_of_its_batch(tmp_path: Path) -> None:
    trained, plain = _model(), _model()
    examples = [EXAMPLES[0], replace(EXAMPLES[1], mask=(0,) * 10 + (1,) * 2)]
    fine_tune(trained, [examples], SETTINGS, seed=0, folder=tmp_path)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.01, betas=(0.9, 0.98))
    loss = sum(token_loss(plain, example, precision="float32") for example in examples) / 8
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped, again = _model(), _model(), _model()
    expected = fine_tune(whole, [EXAMPLES], SETTINGS, seed=0, folder=tmp_path / "whole")

    def stop(self: Progress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Progress, "on_step_end", stop)
        fine_tune(stopped, [EXAMPLES], SETTINGS, seed=0, folder=tmp_path / "stopped")
    found = fine_tune(again, [EXAMPLES], SETTINGS, seed=0, folder=tmp_path / "stopped")
    assert [line["loss"] for line in found] == [line["loss"] for line in expected] and len(found) == 4
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_nothing_to_learn_from_and_a_loss_that_is_not_finite_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no demonstration"):
        fine_tune(_model(), [[]], SETTINGS, seed=0, folder=tmp_path)
    with pytest.raises(TrainingError, match=r"step \d: (loss|grad_norm) is (nan|inf)"):
        settings = replace(SETTINGS, learning_rate=1e30, max_grad_norm=1e30)
        fine_tune(_model(), [EXAMPLES] * 2, settings, seed=0, folder=tmp_path)


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model with a byte tokenizer, a corpus of towns, and a question for each."""
    folder = tmp_path_factory.mktemp("inputs")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!").save_pretrained(folder / "model")
    _model().save_pretrained(folder / "model")
    towns = ["Mirel", "Tavin", "Orsk", "Belm"]
    passages = [
        {"id": str(i), "contents": f'"{town}"\n{town} lies on river {town[::-1]}.'} for i, town in enumerate(towns)
    ]
    questions = [
        {"id": town, "question": f"On which river lies {town}?", "golden_answers": [town[::-1]],
         "metadata": {"gold_doc_ids": [str(i)]}}
        for i, town in enumerate(towns)
    ]  # fmt: skip
    for name, rows in (("corpus", passages), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model": str(folder / "model"),
        "corpus": str(folder / "corpus.jsonl"),
        "questions": str(folder / "questions.jsonl"),
    }


def _config(inputs: dict[str, str], out: Path, **changes: Any) -> WarmStartSFTConfig:
    return WarmStartSFTConfig(
        **inputs,
        out=str(out),
        limits=Limits(max_searches=2, max_tokens=900, max_response_tokens=200, max_observation_tokens=300),
        demonstrations=DemonstrationSettings(topk=2),
        training=SETTINGS,
        device="cpu",
        **changes,
    )


def test_the_command_writes_a_model_that_says_how_it_is_to_be_used(inputs: dict[str, str], tmp_path: Path) -> None:
    warm_start_sft.run(_config(inputs, tmp_path / "agent", skip=1, limit=2))
    report = json.loads((tmp_path / "agent" / "warm_start.json").read_text())
    assert report["demonstrations"] == 2 and report["steps"] == 1
    card = read_agent_card(tmp_path / "agent")
    assert card is not None
    assert (card.protocol, card.topk, card.limits.max_searches) == ("compact", 2, 2)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "agent").config.use_cache
    assert not (tmp_path / "agent" / ".work").exists()


def test_a_finished_output_is_an_error_without_resume_left_alone_with_it_and_never_mixed(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "agent"
    warm_start_sft.run(_config(inputs, out))
    before = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(OutputExistsError):
        warm_start_sft.run(_config(inputs, out))
    warm_start_sft.run(_config(inputs, out), resume=True)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ManifestMismatchError, match="seed was 0, now 1"):
        warm_start_sft.run(_config(inputs, out, seed=1), resume=True)


def test_another_folder_or_a_model_with_other_weights_of_the_same_size_does_not_count_as_done(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "agent"
    out.mkdir()
    (out / "config.json").touch()
    with pytest.raises(ManifestMismatchError, match=r"what it was made from is unknown"):
        warm_start_sft.run(_config(inputs, out), resume=True)
    (out / "config.json").unlink()
    model = tmp_path / "model"
    shutil.copytree(inputs["model"], model)
    warm_start_sft.run(_config(inputs | {"model": str(model)}, out))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ManifestMismatchError, match="model was "):
        warm_start_sft.run(_config(inputs | {"model": str(model)}, out), resume=True)


def test_a_folder_without_weights_is_refused(inputs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="safetensors"):
        warm_start_sft.run(_config(inputs | {"model": str(tmp_path)}, tmp_path / "agent"))


def test_two_processes_do_not_train_in_one_folder_and_another_index_is_another_training(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    held = pytest.raises(OutputExistsError, match="another process is working on it")
    with locked(tmp_path / "agent", folder=True), held:
        warm_start_sft.run(_config(inputs, tmp_path / "agent"), resume=True)
    index = tmp_path / "index"
    index.mkdir()
    keys = []
    for vectors in ("first", "second"):
        (index / "vectors").write_text(vectors)
        search = SearchSpec(backend="faiss", index=str(index))
        keys.append(warm_start_sft._made_from(_config(inputs, tmp_path / "agent", search=search)))
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["index"]


@pytest.mark.parametrize("given", [{"skip": -1}, {"limit": -1}])
def test_numbers_of_questions_below_0_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"(skip|limit): expected at least 0, found -1"):
        WarmStartSFTConfig(**given)  # type: ignore[arg-type]
