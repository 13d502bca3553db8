"""Hydra overrides and environment variables for running verl on the CPU, with reasons."""

from __future__ import annotations

from agentic_r_plugin import compute, memory
from agentic_r_plugin.agent import packed_attention
from agentic_r_plugin.agent.cpu.detect import SWITCH
from agentic_r_plugin.agent.verl_config import FSDP_SETTINGS, critic_tokens

_MICRO_BATCH_TOKENS = 1024
"""Least limit of a micro-batch: activation memory grows with it, and small ones stay in the CPU's caches."""


def cpu_overrides(*, num_workers: int = 1, train_dtype: str = "auto", longest_trajectory: int = 4096) -> list[str]:
    """Hydra overrides for `verl.trainer.main_ppo` on a machine without an accelerator.

    They do not concern model, data or algorithm, and precede the user's own overrides, which may change any of them.

    Args:
        num_workers: trainer processes; each has its own rollout engine and uses one logical Ray GPU.
        train_dtype: compute type of actor, reference and critic: `bfloat16`, `float32`, or `auto`
            (`compute.fast_type`); weights stay in float32.
        longest_trajectory: maximum tokens of a trajectory, prompt included. verl packs trajectories into micro-batches
            of up to 1,024 tokens, or of this many, and ignores micro-batch sizes given in trajectories.
    """
    micro_batch_tokens = max(_MICRO_BATCH_TOKENS, longest_trajectory)
    overrides = [
        "trainer.device=cpu",
        "trainer.nnodes=1",
        f"trainer.n_gpus_per_node={num_workers}",
        "+ray_kwargs.ray_init.address=local",  # by default Ray first looks for a running cluster
        # verl counts only GPUs and NPUs, so Ray is given one logical GPU per worker.
        f"+ray_kwargs.ray_init.num_gpus={num_workers}",
        # Logical cores for verl's actors, which are mostly idle; Ray starts one Python process per core at once.
        f"ray_kwargs.ray_init.num_cpus={4 + 4 * num_workers}",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.free_cache_engine=False",
        # verl's default is 8 processes of each kind, which would only share the same cores.
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "reward.num_workers=1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "data.dataloader_num_workers=0",
    ]
    for engine, fsdp in FSDP_SETTINGS.items():
        overrides += [
            f"{engine}.strategy=fsdp2",  # FSDP1 needs an accelerator to synchronise module states
            f"{fsdp}.strategy=fsdp2",
            f"{fsdp}.use_torch_compile=False",
            f"+{fsdp}.mixed_precision.param_dtype={compute.resolve(train_dtype, 'cpu')}",
            f"+{fsdp}.mixed_precision.reduce_dtype=fp32",
            f"+{fsdp}.mixed_precision.buffer_dtype=fp32",
        ]
    overrides += [
        "actor_rollout_ref.actor.use_dynamic_bsz=True",  # also applies to reference and old log-probabilities
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={micro_batch_tokens}",
        *critic_tokens(micro_batch_tokens),
    ]
    overrides += ["actor_rollout_ref.actor.use_torch_compile=False", "actor_rollout_ref.ref.use_torch_compile=False"]
    for model in ("actor_rollout_ref.model", "critic.model"):
        overrides += [f"{model}.use_remove_padding=True", f"{model}.enable_gradient_checkpointing=False"]
    return overrides + packed_attention.overrides(packed_attention.NAME)


def cpu_environment(*, num_threads: int | None = None) -> dict[str, str]:
    """Environment variables for the process that starts the training; Ray passes them on to its workers.

    Args:
        num_threads: threads of each training and rollout process; the default is all cores, because the two alternate.
    """
    threads = num_threads or compute.threads_of_each()
    return {
        SWITCH: "1",
        "OMP_NUM_THREADS": str(threads),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Activations of a few megabytes are allocated and freed thousands of times per step: keep their memory in the
        # process, in huge pages.
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "MALLOC_TRIM_THRESHOLD_": str(2**28),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        # One heap per process, so that all threads can reuse freed memory.
        "MALLOC_ARENA_MAX": "1",
        **memory.ENVIRONMENT,
    }


UNSET = ("CUDA_VISIBLE_DEVICES",)
"""Variables to remove: an empty list of visible devices makes `ray.init(num_gpus=1)` fail."""
