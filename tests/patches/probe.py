"""Run in a separate process: does each fault that `patches/` cures show in the verl that this process imports?

Prints one JSON object, probe -> outcome; an outcome that begins with "fault:" is the fault.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from agentic_r_plugin.agent.cpu import platform


def process_group() -> str:
    from verl.utils.distributed import initialize_global_process_group_ray

    initialize_global_process_group_ray()
    return str(torch.distributed.get_backend_config())


def valuehead_attention(model_path: Path) -> str:
    from transformers import AutoConfig
    from verl.utils.model import load_valuehead_model

    config = AutoConfig.from_pretrained(model_path, attn_implementation="sdpa", num_labels=1)
    model = load_valuehead_model(str(model_path), torch.float32, config, False)
    return f"{type(model).__name__} {model.config._attn_implementation}"


def rollout_registry() -> str:
    from verl.workers.rollout import base

    if hasattr(base, "register_rollout_class"):
        base.register_rollout_class("hf", "agentic_r_plugin.agent.cpu.rollout.HFServerAdapter")
    return base.get_rollout_class("hf").__name__


def pageable_offload(model_path: Path) -> str:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    engine = FSDPEngineWithLMHead(
        model_config=HFModelConfig(
            path=str(model_path),
            load_tokenizer=False,
            use_remove_padding=False,
            override_config={"attn_implementation": "sdpa"},
            enable_gradient_checkpointing=False,
        ),
        engine_config=FSDPEngineConfig(strategy="fsdp2", forward_only=True, use_torch_compile=False),
        optimizer_config=None,
        checkpoint_config=CheckpointConfig(),
    )
    engine._build_model_optimizer()
    engine.module.eval()(input_ids=torch.zeros((1, 4), dtype=torch.long))
    return next(engine.module.parameters()).device.type


def outcome(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except Exception as error:
        return f"fault: {type(error).__name__}: {error}"


def main() -> None:
    model_path = Path(sys.argv[1]) / "model"
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(model_path)
    platform.register()
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
    outcomes = {"process_group": outcome(process_group)}
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    outcomes["valuehead_attention"] = outcome(lambda: valuehead_attention(model_path))
    outcomes["rollout_registry"] = outcome(rollout_registry)
    outcomes["pageable_offload"] = outcome(lambda: pageable_offload(model_path))
    import verl

    outcomes["verl"] = verl.__file__
    print("\n" + json.dumps(outcomes))


if __name__ == "__main__":
    main()
