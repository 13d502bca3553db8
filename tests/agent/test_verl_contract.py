"""The parts of verl that agent training builds on have the shape it was written for.

With VERL_CHECKOUT=FOLDER, the tests of sources look at that checkout instead of the installed verl.
"""

from __future__ import annotations

import ast
import inspect
import os
from importlib.metadata import version
from pathlib import Path

import pytest
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from agentic_r_plugin.agent import hooks, trainer
from agentic_r_plugin.agent.cpu import hooks as cpu_hooks
from agentic_r_plugin.agent.trainer import AgenticPPOTrainer
from tests.agent.verl_members import MEMBERS, OVERRIDDEN, Sources, installed

PACKAGE = Path(trainer.__file__).parents[1]
VERL = Sources(os.environ.get("VERL_CHECKOUT") or installed())
EXPECTED = {member: parameters for members in MEMBERS.values() for member, parameters in members.items()}


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_release_is_the_one_the_hooks_were_written_for() -> None:
    assert version("verl") == "0.9.1"


@pytest.mark.parametrize("member", EXPECTED)
def test_a_member_that_we_build_on_is_there_with_the_same_parameters(member: str) -> None:
    assert VERL.difference(member, EXPECTED[member]) == ""


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_our_trainer_overrides_a_method_with_the_parameters_of_verls(method: str) -> None:
    assert parameters(getattr(AgenticPPOTrainer, method)) == OVERRIDDEN[method]


def test_what_is_looked_for_in_sources_would_be_missed(tmp_path: Path) -> None:
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl" / "loop.py").write_text(
        "if True:\n    class Base:\n        kept: int\n        def run(self, *, config, **more):\n"
        "            self.made = config.seen\n"
    )
    sources = Sources(tmp_path)
    assert sources.difference("verl.loop:Base.run", ["self", "config", "more"]) == ""
    assert sources.difference("verl.loop:Base.run", ["self"]) == "takes self, config, more"
    assert [sources.difference(f"verl.loop:Base.{name}", None) for name in ("kept", "made")] == ["", ""]
    for member in ("verl.loop:Base.seen", "verl.loop:Base.kept.x", "verl.loop:run", "verl.other:Base"):
        assert sources.difference(member, None) == "missing"


def test_one_module_alone_touches_what_verl_keeps_to_itself() -> None:
    """Names beginning with an underscore, and those of TransferQueue and the replay buffer, which are unstable."""
    unstable = {"transfer_queue", "replay_buffer", "__ray_metadata__"}
    allowed = {file: {member.rpartition(".")[2].rpartition(":")[2] for member in MEMBERS[file]} for file in MEMBERS}
    private = {name for names in allowed.values() for name in names if name.startswith("_")}
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {item.name for node in ast.walk(tree) if isinstance(node, ast.Import) for item in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if used := names & (private | unstable):
            found[file.relative_to(PACKAGE).as_posix()] = used
    assert found.pop("agent/trainer.py") == (allowed["agent/trainer.py"] & private) | unstable
    assert found == {"agent/cpu/rollout.py": allowed["agent/cpu/rollout.py"] & private}


def test_the_members_that_hooks_replace_are_the_ones_that_are_checked() -> None:
    for file, module in (("agent/hooks.py", hooks), ("agent/cpu/hooks.py", cpu_hooks)):
        assert {hook.symbol for hook in module.HOOKS} == set(MEMBERS[file])


def test_the_page_says_of_each_member_what_other_versions_have() -> None:
    page = (PACKAGE.parent / "docs" / "engines.md").read_text(encoding="utf-8")
    names = {member.rpartition(".")[2].rpartition(":")[2] for member in EXPECTED}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_the_order_of_a_step_is_the_one_the_trainer_relies_on() -> None:
    base = "verl.trainer.ppo.v1.trainer_base:PPOTrainer"
    step = VERL.text(f"{base}._step_once")
    assert step.index("_balance_batch") < step.index("_compute_old_log_prob") < step.index("_compute_advantage")
    fit = VERL.text(f"{base}.fit")
    assert fit.index("self.step(") < fit.index("self._save_checkpoint()") < fit.index("self._compute_metrics(")
    save = VERL.text(f"{base}._save_checkpoint")
    assert save.index("actor_rollout_wg.save_checkpoint") < save.index("latest_checkpointed_iteration.txt")
    assert save.index("latest_checkpointed_iteration.txt") < save.rindex("checkpoint_callback.on_save")
    init = VERL.text(f"{base}.init")
    assert init.index("self._setup()") < init.index("self.on_init_end()")
    assert "self._load_checkpoint()" in VERL.text(f"{base}._setup")


def test_the_replay_buffer_evicts_failed_groups_by_the_third_of_its_reasons() -> None:
    evict = VERL.text("verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._evict_terminal_groups")
    assert "stale_uids, dapo_uids, failed_uids, dapo_counts = eviction_reasons" in evict


def test_the_critics_micro_batches_are_sized_by_the_key_that_is_set_for_them() -> None:
    source = VERL.text("verl.trainer.ppo.v1.trainer_base")
    assert "critic_cfg.engine.max_token_len_per_gpu = critic_cfg.ppo_infer_max_token_len_per_gpu" in source
    assert "critic_cfg.engine.infer_max_token_len_per_gpu = critic_cfg.ppo_infer_max_token_len_per_gpu" in source


def test_verl_calls_a_steps_updates_and_metrics_as_the_trainer_overrides_them() -> None:
    step = VERL.text("verl.trainer.ppo.v1.trainer_base:PPOTrainer.step")
    assert "self.parameter_sync_step" in step and "self._step_once(" in step
    assert "train_batch_size // self.parameter_sync_step" in step


def test_our_trainer_is_registered_and_is_verls_synchronous_one() -> None:
    assert get_trainer_cls("agentic_r_sync") is AgenticPPOTrainer
    assert issubclass(AgenticPPOTrainer, PPOTrainerSync)


def test_verls_client_takes_what_the_agent_loop_sends() -> None:
    taken = VERL.parameters("verl.workers.rollout.llm_server:LLMServerClient.generate")
    assert {"request_id", "prompt_ids", "sampling_params"} <= set(taken)
