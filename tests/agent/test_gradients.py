"""Gradients of verl's own actor and critic update, in one process: what passages cannot change, and what rewards reach.

The workers are verl's `TrainingWorker` with the losses that its trainer gives them, on the tiny agent; the trajectories
are finished sessions. The learning rate is 0, so that every update starts from the same weights.

Legend: B trajectories, R response positions.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from transformers import AutoTokenizer

from agentic_r_plugin.agent import prepare
from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.session import Session
from tests.agent.tiny_world import LIMITS, NAMES, scripted

SPOILED = ("labels", "advantages", "old_log_probs", "ref_log_prob")


@pytest.fixture(scope="module")
def sessions(agent_dir: Path) -> list[Session]:
    codec = TokenizerCodec(AutoTokenizer.from_pretrained(agent_dir))
    return [scripted(name, codec) for name in NAMES[:4]]


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """This process as the only worker of a group, as Ray would make it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    before = dict(os.environ)
    os.environ.update(variables | {"MASTER_PORT": str(port)})
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def composed(agent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """verl's configuration as `train-agent` makes it for a CPU, in float32."""
    config = TrainAgentConfig(
        model=str(agent_dir), questions="q", retrieval_url="http://127.0.0.1:1", out=str(tmp_path_factory.mktemp("g")),
        protocol="compact", limits=LIMITS, batch_size=4, mini_batch_size=4, micro_batch_size=2, cpu=True, kl_loss=True,
        kl_coef=0.1, steps=2,
        verl=["actor_rollout_ref.actor.optim.lr=0", "critic.optim.lr=0",
              "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
              "critic.fsdp.mixed_precision.param_dtype=fp32"],
    )  # fmt: skip
    return prepare.compose(config, num_questions=4, prompt_lengths=[30])[0]


def worker(role: str, composed: Any) -> Any:
    """verl's worker, set up as `ActorRolloutRefWorker` and `PPOTrainer` do."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss, value_loss

    if role == "actor":
        config: Any = omega_conf_to_dataclass(composed.actor_rollout_ref.actor)
        config.model_config = omega_conf_to_dataclass(composed.actor_rollout_ref.model)
        model, loss, kind = config.model_config, partial(ppo_loss, config=config), "language_model"
    else:
        config = omega_conf_to_dataclass(composed.critic)
        model, loss, kind = config.model, partial(value_loss, config=config), "value_model"
    config.engine.use_dynamic_bsz = False
    config.engine.micro_batch_size_per_gpu = 2
    made = TrainingWorker(
        TrainingWorkerConfig(
            model_type=kind, model_config=model, engine_config=config.engine, optimizer_config=config.optim,
            checkpoint_config=config.checkpoint,
        )
    )  # fmt: skip
    made.reset()
    made.set_loss_fn(loss)
    return made


@pytest.fixture(scope="module")
def actor(process_group: None, composed: Any) -> Any:
    return worker("actor", composed)


@pytest.fixture(scope="module")
def critic(process_group: None, composed: Any) -> Any:
    return worker("critic", composed)


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def noise(sessions: list[Session], seed: int) -> list[torch.Tensor]:
    """A number for each response position."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(session.response_ids), generator=generator) for session in sessions]


def batch_of(sessions: list[Session], *, spoil: str = "", wrong_mask: bool = False) -> TensorDict:
    """What verl's queue gives to an update; `spoil` changes one field where the environment wrote."""
    from verl.utils import tensordict_utils as tu

    masks = [torch.tensor(session.response_mask) for session in sessions]
    fields = {
        name: noise(sessions, seed)
        for seed, name in enumerate(("advantages", "old_log_probs", "ref_log_prob", "values", "returns"))
    }
    fields["old_log_probs"] = [values.abs().neg() for values in fields["old_log_probs"]]
    fields["ref_log_prob"] = [old + 0.1 * ref for old, ref in zip(
        fields["old_log_probs"], fields["ref_log_prob"], strict=True)]  # fmt: skip
    if spoil in fields:
        fields[spoil] = [
            torch.where(mask.bool(), values, values + 3.0) for mask, values in zip(masks, fields[spoil], strict=True)
        ]
    trained = [torch.ones_like(mask) for mask in masks] if wrong_mask else masks
    prompts = [torch.tensor(session.prompt_ids) for session in sessions]
    responses = [torch.tensor(session.response_ids) for session in sessions]
    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    tensors = {
        "prompts": nested(prompts), "responses": nested(responses), "input_ids": nested(whole),
        "position_ids": nested([torch.arange(len(ids)) for ids in whole]),
        "response_mask": nested(trained), "loss_mask": nested(trained),
        **{name: nested(values) for name, values in fields.items()},
    }  # fmt: skip
    size = len(sessions)
    settings = {
        "mini_batch_size": size, "global_batch_size": size, "epochs": 1, "seed": 0, "temperature": 1.0,
        "dataloader_kwargs": {"shuffle": False}, "calculate_entropy": False,
    }  # fmt: skip
    return tu.get_tensordict(tensors, settings)


def gradients(worker: Any, batch: TensorDict) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, as verl's update hands it to the optimizer."""
    found: dict[str, torch.Tensor] = {}
    step = worker.engine.optimizer_step

    def looked_at() -> Any:
        for name, parameter in worker.engine.module.named_parameters():
            gradient = parameter.grad
            found[name] = getattr(gradient, "full_tensor", lambda kept=gradient: kept)().detach().clone()
        return step()

    worker.engine.optimizer_step = looked_at
    try:
        worker.train_mini_batch(batch)
    finally:
        worker.engine.optimizer_step = step
    assert all(bool(gradient.abs().max() > 0) for gradient in found.values()) and found
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def spoil_labels(actor: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Afterwards, the token ids whose log-probabilities verl takes are other ones where the environment wrote.

    The ids that the model reads stay as they are, so nothing but the labels changes.
    """
    prepare_inputs = actor.engine.prepare_model_inputs

    def spoiled(micro_batch: TensorDict) -> Any:
        inputs, outputs = prepare_inputs(micro_batch)
        by_environment = torch.cat([
            torch.cat([torch.zeros(len(prompt)), 1 - mask.float()])
            for prompt, mask in zip(micro_batch["prompts"].unbind(), micro_batch["true_mask"].unbind(), strict=True)
        ]).bool()  # fmt: skip
        labels = outputs["input_ids_rmpad_rolled"]
        at = torch.roll(by_environment, shifts=-1)
        outputs["input_ids_rmpad_rolled"] = torch.where(at.reshape(labels.shape), (labels + 7) % 200, labels)
        return inputs, outputs

    return lambda: monkeypatch.setattr(actor.engine, "prepare_model_inputs", spoiled)


def with_true_mask(batch: TensorDict, sessions: list[Session]) -> TensorDict:
    batch["true_mask"] = nested([torch.tensor(session.response_mask) for session in sessions])
    return batch


@pytest.mark.parametrize("wrong_mask", [False, True], ids=["our mask", "a wrong mask"])
@pytest.mark.parametrize("field", SPOILED)
def test_the_actors_gradient_ignores_passages_unless_the_mask_is_wrong(
    actor: Any, sessions: list[Session], spoil_labels: Callable[[], None], field: str, wrong_mask: bool
) -> None:
    clean = gradients(actor, with_true_mask(batch_of(sessions, wrong_mask=wrong_mask), sessions))
    if field == "labels":
        spoil_labels()
    spoiled = gradients(actor, with_true_mask(batch_of(sessions, spoil=field, wrong_mask=wrong_mask), sessions))
    assert same(clean, spoiled) is not wrong_mask


@pytest.mark.parametrize("wrong_mask", [False, True], ids=["our mask", "a wrong mask"])
@pytest.mark.parametrize("field", ["values", "returns"])
def test_the_critics_gradient_ignores_passages_unless_the_mask_is_wrong(
    critic: Any, sessions: list[Session], field: str, wrong_mask: bool
) -> None:
    clean = gradients(critic, batch_of(sessions, wrong_mask=wrong_mask))
    spoiled = gradients(critic, batch_of(sessions, spoil=field, wrong_mask=wrong_mask))
    assert same(clean, spoiled) is not wrong_mask


def test_tokens_of_the_models_own_do_change_the_gradient(actor: Any, sessions: list[Session]) -> None:
    batch, other = batch_of(sessions), batch_of(sessions)
    other["advantages"] = nested([values + 1.0 for values in other["advantages"].unbind()])
    assert not same(gradients(actor, batch), gradients(actor, other))


# --- The outcome reward -----------------------------------------------------------------------------------------------


def advantages_of(sessions: list[Session], composed: Any, masks_BR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns as verl's trainer computes them: reward 1 on the last token of the first trajectory."""
    from verl.protocol import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    rewards_BR = torch.zeros(masks_BR.shape)
    rewards_BR[0, len(sessions[0].response_ids) - 1] = 1.0
    data = DataProto(
        batch=TensorDict(
            {"token_level_rewards": rewards_BR, "values": torch.zeros(masks_BR.shape), "response_mask": masks_BR},
            len(sessions),
        )
    )
    algorithm = composed.algorithm
    data = compute_advantage_for_multi_trajectories(
        data, [f"u_{row}_0" for row in range(len(sessions))], algorithm.adv_estimator, algorithm.gamma, algorithm.lam,
        config=algorithm,
    )  # fmt: skip
    return data.batch["advantages"], data.batch["returns"]


def padded(sessions: list[Session]) -> torch.Tensor:
    rows = [torch.tensor(session.response_mask) for session in sessions]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def test_the_outcome_reward_reaches_the_first_token_and_its_gradient(
    actor: Any, sessions: list[Session], composed: Any
) -> None:
    masks_BR = padded(sessions)
    advantages_BR, returns_BR = advantages_of(sessions, composed, masks_BR)
    assert returns_BR[0][masks_BR[0].bool()] == pytest.approx(torch.ones(int(masks_BR[0].sum())))
    assert returns_BR[1:].abs().max() == 0
    assert advantages_BR[0, 0] > 0 > advantages_BR[1, 0]

    def update(first_token: float) -> dict[str, torch.Tensor]:
        batch = batch_of(sessions)
        rows = [advantages_BR[row, : len(session.response_ids)].clone() for row, session in enumerate(sessions)]
        rows[0][0] *= first_token
        batch["advantages"] = nested(rows)
        # Ratios below 1, which PPO does not clip where the advantage is positive.
        batch["old_log_probs"] = nested([torch.zeros(len(session.response_ids)) for session in sessions])
        return gradients(actor, batch)

    assert not same(update(1.0), update(0.0))


def test_a_mask_that_ends_with_the_environment_loses_the_reward(sessions: list[Session], composed: Any) -> None:
    masks_BR = padded(sessions)
    masks_BR[0, len(sessions[0].response_ids) - 1] = 0
    _, returns_BR = advantages_of(sessions, composed, masks_BR)
    assert returns_BR.abs().max() == 0
