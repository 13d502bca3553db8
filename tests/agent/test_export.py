"""A checkpoint becomes a Hugging Face folder, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from agentic_r_plugin.agent.export import export_model, join_shards
from agentic_r_plugin.errors import TrainingError


def checkpoint_of(folder: Path, agent_dir: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A one-rank checkpoint as verl writes it."""
    source = folder / "huggingface"
    AutoModelForCausalLM.from_pretrained(agent_dir).config.save_pretrained(source)
    AutoTokenizer.from_pretrained(agent_dir).save_pretrained(source)
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    torch.save(weights, folder / "model_world_size_1_rank_0.pt")
    return folder


def test_weights_keep_every_bit_and_the_tokenizer_comes_along(tmp_path: Path, agent_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(agent_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-7 * torch.randn_like(parameter))
    checkpoint = checkpoint_of(tmp_path / "actor", agent_dir, model.state_dict())
    export_model(checkpoint, tmp_path / "agent")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    assert exported.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    text = "<think> Ada </think>"
    assert AutoTokenizer.from_pretrained(tmp_path / "agent").encode(text) == AutoTokenizer.from_pretrained(
        agent_dir
    ).encode(text)


def test_a_critic_keeps_its_value_head(tmp_path: Path, agent_dir: Path) -> None:
    critic = AutoModelForTokenClassification.from_pretrained(agent_dir, num_labels=1)
    checkpoint = checkpoint_of(tmp_path / "critic", agent_dir, critic.state_dict())
    export_model(checkpoint, tmp_path / "out")
    exported = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", num_labels=1)
    assert torch.equal(exported.score.weight, critic.score.weight)
    assert torch.equal(exported.model.embed_tokens.weight, critic.model.embed_tokens.weight)


def test_shards_of_two_ranks_are_joined() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = torch.arange(12.0).reshape(3, 4)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
        halves = [
            DTensor.from_local(whole[:, 2 * rank : 2 * rank + 2].contiguous(), mesh, [Shard(1)], run_check=False)
            for rank in range(2)
        ]
        copies = [DTensor.from_local(whole, mesh, [Replicate()], run_check=False)] * 2
        assert torch.equal(join_shards("halves", halves), whole)
        assert torch.equal(join_shards("copies", copies), whole)
        assert torch.equal(join_shards("plain", [whole, whole]), whole)
    finally:
        torch.distributed.destroy_process_group()


def test_lora_adapters_become_part_of_the_weights(tmp_path: Path, agent_dir: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(agent_dir), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    checkpoint = checkpoint_of(tmp_path / "actor", agent_dir, adapted.state_dict())
    with pytest.raises(TrainingError, match=r"no lora_train_meta\.json"):
        export_model(checkpoint, tmp_path / "agent")
    (checkpoint / "lora_train_meta.json").write_text(json.dumps({"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"}))
    export_model(checkpoint, tmp_path / "agent")
    ids = torch.arange(20, 40)[None]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "agent").eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(agent_dir).eval()(ids).logits
    assert (plain - exported(ids).logits).abs().max() > 0.01


def test_a_checkpoint_that_is_not_whole_is_refused_and_leaves_nothing(tmp_path: Path, agent_dir: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(agent_dir).state_dict()
    dropped = "model.norm.weight"
    checkpoint = checkpoint_of(tmp_path / "actor", agent_dir, {k: v for k, v in weights.items() if k != dropped})
    with pytest.raises(TrainingError, match=r"missing \['model\.norm\.weight'\]"):
        export_model(checkpoint, tmp_path / "agent")
    (checkpoint / "model_world_size_1_rank_0.pt").unlink()
    with pytest.raises(TrainingError, match=r"actor: model_world_size_1_rank_0\.pt is missing"):
        export_model(checkpoint, tmp_path / "agent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["actor"]
