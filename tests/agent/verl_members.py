"""What this package builds on in verl, member by member.

Members are looked up in verl's sources, which need neither be installed nor importable:

    python tests/agent/verl_members.py [CHECKOUT ...]      # a table; without a checkout, of the installed verl
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

_BASE = "verl.trainer.ppo.v1.trainer_base"
_LOOP = "verl.experimental.agent_loop.agent_loop"
_BUFFER = "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer"
_REPLICA = "verl.workers.rollout.replica:RolloutReplica"

OVERRIDDEN: dict[str, list[str]] = {
    "step": ["self", "metrics", "timing_raw"],
    "on_init_end": ["self"],
    "_compute_ref_log_prob": ["self", "batch", "metrics"],
    "_balance_batch": ["self", "batch", "metrics", "logging_prefix", "keep_minibatch"],
    "_compute_metrics": ["self", "batch", "metrics", "timing_raw", "global_steps", "epoch"],
    "_validate": ["self"],
}
"""Methods of verl's trainer that ours overrides, and their parameters."""

MEMBERS: dict[str, dict[str, list[str] | None]] = {
    "agent/trainer.py": {
        **{f"{_BASE}:PPOTrainer.{name}": parameters for name, parameters in OVERRIDDEN.items()},
        f"{_BASE}:PPOTrainer.global_steps": None,
        f"{_BASE}:PPOTrainer.total_training_steps": None,
        f"{_BASE}:PPOTrainer.parameter_sync_step": None,
        f"{_BASE}:PPOTrainer.use_critic": None,
        f"{_BASE}:PPOTrainer.replay_buffer": None,
        f"{_BASE}:PPOTrainer.checkpoint_callback": None,
        f"{_BASE}:register_trainer": ["name"],
        f"{_BASE}:tq": None,  # TransferQueue holds the trajectories
        f"{_BASE}:KVBatchMeta": None,
        "verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync": None,
        "verl.trainer.ppo.v1.trainer_colocate_async:PPOTrainerColocateAsync": None,
        "verl.trainer.ppo.v1.trainer_separate_async:PPOTrainerSeparateAsync": None,
        "verl.trainer.ppo.checkpoint_callback:CheckpointCallback.on_save": [
            "self", "trainer", "global_step", "checkpoint_dir", "async_save", "kwargs",
        ],
        f"{_BUFFER}._evict_terminal_groups": ["self", "global_steps", "partition_id", "eviction_reasons"],
        f"{_BUFFER}.poll_interval": None,
        "verl.trainer.main_ppo:TaskRunnerV1.run": ["self", "config"],
    },
    "agent/agent_loop.py": {
        f"{_LOOP}:AgentLoopBase.run": ["self", "sampling_params", "kwargs"],
        **{f"{_LOOP}:AgentLoopOutput.{field}": None for field in (
            "prompt_ids", "response_ids", "response_mask", "response_logprobs", "num_turns", "metrics", "extra_fields",
        )},
        "verl.workers.rollout.llm_server:LLMServerClient.generate": None,
        "verl.utils.rollout_trace:rollout_trace_op": ["func"],
    },
    "agent/worker.py": {"verl.trainer.main_ppo:run_ppo": ["config", "task_runner_class"]},
    "agent/hooks.py": {
        "verl.utils.model:load_valuehead_model": ["local_path", "torch_dtype", "model_config", "trust_remote_code"],
    },
    "agent/cpu/hooks.py": {
        "verl.utils.distributed:initialize_global_process_group_ray": ["timeout_second", "backend"],
        "verl.workers.rollout.base:_ROLLOUT_REGISTRY": None,
        "verl.workers.engine.fsdp.transformer_impl:CPUOffloadPolicy": None,
    },
    "agent/cpu/rollout.py": {
        f"{_REPLICA}.servers": None,
        f"{_REPLICA}._server_handle": None,
        f"{_REPLICA}._server_address": None,
        "verl.workers.rollout.utils:ensure_async_iterator": ["iterable"],
    },
}  # fmt: skip
"""Module of this package -> what it uses, with the parameters that it relies on. The hooks replace their members."""


class Sources:
    """The sources of one verl.

    Args:
        root: folder that holds the folder `verl`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @functools.cache  # noqa: B019
    def module(self, name: str) -> ast.Module | None:
        path = self.root.joinpath(*name.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None

    def find(self, member: str) -> ast.AST | None:
        """Where `module:Name.attribute` is defined; None if it is not."""
        module, _, path = member.partition(":")
        tree = self.module(module)
        name, *rest = path.split(".")
        found = tree and self._named(tree, name)
        for attribute in rest:
            found = self._attribute(tree, found, attribute) if isinstance(found, ast.ClassDef) else None
        return found

    def _named(self, tree: ast.Module, name: str) -> ast.AST | None:
        return next((node for node in _statements(tree) if name in _names(node)), None)

    def _attribute(self, tree: ast.Module, owner: ast.ClassDef, name: str) -> ast.AST | None:
        for node in _statements(owner):
            if name in _names(node):
                return node
        own = (node for node in ast.walk(owner) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
        return next((node for node in own if node.attr == name), None)

    def parameters(self, member: str) -> list[str]:
        function = self.find(member)
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef), member
        given = function.args
        plain = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        return [one.arg for one in [*plain, *filter(None, (given.vararg, given.kwarg))]]

    def text(self, member: str) -> str:
        """Source of a member, or of a whole module, as `ast` writes it: quotes and line breaks are uniform."""
        found = self.find(member) if ":" in member else self.module(member)
        return ast.unparse(found) if found is not None else ""

    def difference(self, member: str, expected: list[str] | None) -> str:
        """What is different, in words; empty if the member is there as expected."""
        if self.find(member) is None:
            return "missing"
        if expected is not None and (present := self.parameters(member)) != expected:
            return f"takes {', '.join(present)}"
        return ""


def _statements(node: ast.Module | ast.ClassDef) -> Iterator[ast.AST]:
    """The statements of a body, those within `if`, `try` and `with` included."""
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        statement = waiting.pop(0)
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            waiting += ast.iter_child_nodes(statement)


def _names(node: ast.AST) -> set[str]:
    """Names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {item.asname or item.name for item in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def installed() -> Path:
    """The folder that holds the installed verl."""
    spec = importlib.util.find_spec("verl")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]


def main(checkouts: list[str]) -> int:
    """Print a table of all members; 1 if one is different."""
    all_sources = [Sources(root) for root in checkouts or [installed()]]
    print(f"| member | {' | '.join(source.root.name for source in all_sources)} |\n|---|{'---|' * len(all_sources)}")
    different = False
    for members in MEMBERS.values():
        for member, expected in members.items():
            found = [source.difference(member, expected) for source in all_sources]
            different |= any(found)
            print(f"| `{member}` | {' | '.join(item or 'same' for item in found)} |")
    return int(different)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
