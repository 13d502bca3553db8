"""A rollout engine for verl on a Hugging Face model: a Ray actor that batches the requests of many agent loops.

It has three parts, like verl's own engines: `HFServer` (the actor that holds the model and generates), `HFReplica`
(starts the actor), and `HFServerAdapter` (runs in the trainer's workers and sends the weights to the actor).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import ray
import torch
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from agentic_r_plugin.agent.cpu.batching import RequestBatcher, parse_sampling
from agentic_r_plugin.errors import UpstreamError


class HFServer:
    """The Ray actor: holds one model and processes one batch of requests at a time.

    Args:
        config: verl's rollout configuration.
        model_config: verl's model configuration, as given to the trainer.
    """

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        from transformers import AutoModelForCausalLM
        from verl.utils.torch_dtypes import PrecisionType

        from agentic_r_plugin.llm.hf_generate import HFGenerator

        self.config, self.replica_rank = config, replica_rank
        self.global_steps: int | None = None
        model_config = omega_conf_to_dataclass(model_config)
        self.model = AutoModelForCausalLM.from_pretrained(
            model_config.local_path,
            config=model_config.hf_config,
            dtype=PrecisionType.to_dtype(config.dtype),
            attn_implementation="sdpa",  # the configuration's value is for training and supports no cache
            trust_remote_code=model_config.trust_remote_code,
        )
        self.max_length = min(
            config.max_model_len or config.prompt_length + config.response_length,
            getattr(self.model.config, "max_position_embeddings", None) or 2**31,
        )
        self.generator = HFGenerator(self.model, model_config.tokenizer, prefix_cache_tokens=16_384)
        self.generator.attention.require(self.max_length)
        self.batcher = RequestBatcher(self.generator, seed=config.seed + replica_rank, quiet_s=0.01, max_wait_s=0.1)

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **kwargs: Any
    ) -> TokenOutput:
        """Generate the continuation of one prompt, as token ids.

        Args:
            sampling_params: `temperature`, `top_p`, `top_k`, `seed`, `stop`, `max_tokens`, `logprobs`, `ignore_eos`.
                The ids always include the stop string, as in vLLM, where `include_stop_str_in_output` affects only
                the text.

        Raises:
            BackendError: an unsupported sampling parameter, or a prompt that fills the context.
        """
        wanted = parse_sampling(
            sampling_params,
            num_prompt_tokens=len(prompt_ids),
            max_length=self.max_length,
            response_length=self.config.response_length,
            total_length=self.config.prompt_length + self.config.response_length,
        )
        generated = await self.batcher.submit(list(prompt_ids), wanted)
        return TokenOutput(
            token_ids=list(generated.token_ids),
            log_probs=list(generated.logprobs) if generated.logprobs is not None else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    async def load_weights(self, state: dict[str, torch.Tensor], global_steps: int | None) -> dict[str, float]:
        """Load the trainer's weights, after the current batch has finished.

        Returns:
            Number of tensors and the sum of all their values, which the trainer compares with its own.

        Raises:
            UpstreamError: parameter names do not match this model.
        """
        async with self.batcher.idle():
            # Not strict: the trainer may leave out tied weights, which `tie_weights` sets below.
            outcome = self.model.load_state_dict(state, strict=False)
            tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
            missing = set(outcome.missing_keys) - tied
            if missing or outcome.unexpected_keys:
                raise UpstreamError(
                    f"weights from the trainer do not fit the rollout model: missing {sorted(missing)[:5]}, "
                    f"unknown {sorted(outcome.unexpected_keys)[:5]}"
                )
            self.model.tie_weights()
            self.generator.weights_changed()
            self.batcher.new_weights(global_steps)
            self.global_steps = global_steps if global_steps is not None else self.global_steps
            # Summed from the model, not from `state`, to show that the weights are in place.
            own = self.model.state_dict()
            return weight_sums((name, own[name]) for name in state)

    async def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is no device memory to release, no cache to restore and no profiler."""

    wake_up = sleep = resume_kv_cache = start_profile = stop_profile = _nothing

    async def clear_kv_cache(self) -> None:
        async with self.batcher.idle():
            self.generator.weights_changed()

    release_kv_cache = clear_kv_cache

    async def set_global_steps(self, global_steps: int) -> None:
        self.global_steps = global_steps

    async def wait_for_requests_to_drain(self) -> None:
        async with self.batcher.idle():
            pass


class HFReplica(RolloutReplica):
    """A replica is one worker process with one server actor."""

    async def launch_servers(self) -> None:
        """Start the actor under the name that the adapter looks up."""
        server: Any = (
            ray.remote(HFServer)
            .options(name=server_name(self.replica_rank), num_cpus=0, max_concurrency=self.max_concurrency)
            .remote(self.config, self.model_config, self.replica_rank)
        )
        await server.wait_for_requests_to_drain.remote()  # returns once the model is loaded
        self.servers = [server]
        self._server_handle, self._server_address = server, server_name(self.replica_rank)

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Not supported: only verl's asynchronous trainers abort requests, and they need an accelerator."""
        raise NotImplementedError("the hf rollout engine cannot abort requests: use trainer.v1.trainer_mode=sync")


class HFServerAdapter(BaseRollout):
    """Runs in each trainer worker; sends the weights to the worker's server and verifies that they arrived."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        ranks = (
            self.config.tensor_model_parallel_size
            * self.config.data_parallel_size
            * self.config.pipeline_model_parallel_size
        )
        rank = torch.distributed.get_rank()
        self.replica_rank = rank // ranks if replica_rank == -1 else replica_rank
        self.has_server = rank % ranks == 0

    async def resume(self, tags: list[str]) -> None:
        """Do nothing: nothing is ever released."""

    async def release(self) -> None:
        """Do nothing: nothing is ever released."""

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]] | AsyncIterator[tuple[str, torch.Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Send all weights and compare the sums on both sides.

        Raises:
            UpstreamError: the wire format is not full tensors, or the sums differ.
        """
        if wire_format != "named_tensors":
            raise UpstreamError(f"hf rollout takes wire_format='named_tensors', verl sent {wire_format!r}")
        from verl.utils.torch_dtypes import PrecisionType
        from verl.workers.rollout.utils import ensure_async_iterator

        dtype = PrecisionType.to_dtype(self.config.dtype)
        state = {}
        async for name, tensor in ensure_async_iterator(weights):  # gathering is collective, so every rank iterates
            if self.has_server:
                state[name] = tensor.detach().to(dtype)  # the engine's type, so that both sides sum the same numbers
        if not self.has_server:
            return
        server = ray.get_actor(server_name(self.replica_rank))
        arrived = await server.load_weights.remote(ray.put(state), global_steps)
        sent = weight_sums(state.items())
        # Exactly equal, because both sides add the same numbers in the same order.
        if arrived != sent:
            raise UpstreamError(f"weights of step {global_steps}: trainer sent {sent}, rollout engine holds {arrived}")
        print(f"hf rollout {self.replica_rank}: weights of step {global_steps} in place, {sent}", flush=True)


def server_name(replica_rank: int) -> str:
    """Ray name of a replica's server."""
    return f"hf_server_{replica_rank}_0"


def weight_sums(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """Number of tensors and the float64 sum of all their values, added in order of name."""
    named = sorted(weights, key=lambda item: item[0])
    return {"tensors": len(named), "sum": float(sum(tensor.double().sum().item() for _, tensor in named))}
