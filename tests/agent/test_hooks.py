"""What our changes to verl leave to verl."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from transformers import Qwen2Config

from agentic_r_plugin.agent.hooks import configured_attention


def test_a_critic_that_cannot_be_loaded_gets_verls_own_answer(tmp_path: Path) -> None:
    asked = []

    def original(*arguments: object) -> str:
        asked.append(arguments)
        return "verl's"

    owner = SimpleNamespace(load=original)
    configured_attention(owner, "load", original)
    config = Qwen2Config(attn_implementation="sdpa")
    assert owner.load(str(tmp_path), None, config, False) == "verl's"
    assert asked == [(str(tmp_path), None, config, False)]
