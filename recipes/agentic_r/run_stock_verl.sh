#!/usr/bin/env bash
# PPO with verl's own command and trainer: `python -m verl.trainer.main_ppo` with our agent loop, reward and data named in
# its configuration, 8 x 80 GB. No class of this package is around the trainer; its entry point `verl.plugins` still loads.
#   recipes/agentic_r/run_stock_verl.sh                       trains; the same command again goes on (verl's resume_mode)
#   recipes/agentic_r/run_stock_verl.sh trainer.nnodes=2      further arguments are verl's own overrides
# MODEL, TRAIN, VAL (files of prepare_data.py), RETRIEVAL_URL, RETRIEVAL_TOKEN_ENV and OUT as in launch.sh; PROTOCOL and
# MAX_TOKENS (of a trajectory) go to stock_agent_loop.yaml.
# Against `agentic-r train-agent` this loses: checks before the start (service, prompt lengths, memory), limits that verl
# never cuts; trajectories whose search failed stay in the batch (their mask is empty); the order of mini-batches by seed,
# so a resumed step is not the uninterrupted one; metrics.jsonl, rollouts/ and the metrics of searches in training
# (validation has them); the stability rule, the stop at a loss that is not finite and its culprits; checkpoints kept by
# stability; and the exported agent/ folder with agent.json (verl's model merger makes a Hugging Face folder).
set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MODEL=${MODEL:-models/Qwen2.5-7B}
TRAIN=${TRAIN:-data/train.parquet}
VAL=${VAL:-data/validation.parquet}
OUT=${OUT:-runs/agentic_r/stock}
tokens=${MAX_TOKENS:-4096}
prompt=${MAX_PROMPT_TOKENS:-512}
attention=(
  +actor_rollout_ref.model.override_config.attn_implementation=packed_causal
  +critic.model.override_config.attn_implementation=packed_causal
)
if "${PYTHON:-python3}" -c 'import flash_attn' 2>/dev/null; then
  attention=()
fi
overrides=()
for argument in "$@"; do
  # slurm.sh and ray_job.sh add it; verl's resume_mode goes on without.
  [[ $argument == --resume ]] || overrides+=("$argument")
done
exec "${PYTHON:-python3}" -m verl.trainer.main_ppo \
  algorithm.adv_estimator=gae algorithm.gamma=1.0 algorithm.lam=1.0 \
  algorithm.use_kl_in_reward=true algorithm.kl_ctrl.kl_coef=0.001 \
  data.train_files="$TRAIN" data.val_files="$VAL" data.prompt_key=prompt data.shuffle=true data.seed=0 \
  data.train_batch_size=512 data.max_prompt_length="$prompt" data.max_response_length="$tokens" \
  data.truncation=error data.filter_overlong_prompts=false \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.model.use_remove_padding=true actor_rollout_ref.model.enable_gradient_checkpointing=true \
  actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.fsdp_config.strategy=fsdp2 \
  actor_rollout_ref.actor.fsdp_config.param_offload=true actor_rollout_ref.actor.fsdp_config.optimizer_offload=true \
  actor_rollout_ref.actor.fsdp_config.entropy_from_logits_with_chunking=true \
  actor_rollout_ref.actor.ppo_mini_batch_size=256 actor_rollout_ref.actor.use_dynamic_bsz=true \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 actor_rollout_ref.actor.loss_agg_mode=token-mean \
  actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.285 \
  actor_rollout_ref.ref.strategy=fsdp2 actor_rollout_ref.ref.fsdp_config.strategy=fsdp2 \
  actor_rollout_ref.ref.fsdp_config.param_offload=true \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.mode=async actor_rollout_ref.rollout.n=1 \
  actor_rollout_ref.rollout.temperature=1.0 actor_rollout_ref.rollout.gpu_memory_utilization=0.7 \
  actor_rollout_ref.rollout.max_model_len="$tokens" actor_rollout_ref.rollout.calculate_log_probs=true \
  actor_rollout_ref.rollout.val_kwargs.temperature=0 actor_rollout_ref.rollout.val_kwargs.do_sample=false \
  actor_rollout_ref.rollout.agent.num_workers=8 \
  actor_rollout_ref.rollout.agent.default_agent_loop=agentic_r \
  actor_rollout_ref.rollout.agent.agent_loop_config_path="$recipe/stock_agent_loop.yaml" \
  critic.strategy=fsdp2 critic.fsdp.strategy=fsdp2 critic.fsdp.param_offload=true critic.fsdp.optimizer_offload=true \
  critic.model.path="$MODEL" critic.model.use_remove_padding=true critic.model.enable_gradient_checkpointing=true \
  critic.ppo_max_token_len_per_gpu=16384 ++critic.ppo_infer_max_token_len_per_gpu=16384 \
  critic.optim.lr=1e-5 critic.optim.lr_warmup_steps_ratio=0.015 critic.cliprange_value=0.5 \
  reward.custom_reward_function.path=pkg://agentic_r_plugin.agent.verl_reward reward.custom_reward_function.name=compute_score \
  trainer.v1.trainer_mode=sync trainer.project_name=agentic_r trainer.experiment_name="$(basename "$OUT")" \
  trainer.default_local_dir="$OUT/checkpoints" trainer.n_gpus_per_node=8 trainer.nnodes=1 \
  trainer.total_training_steps=500 trainer.total_epochs=100 trainer.save_freq=50 trainer.test_freq=50 \
  trainer.logger='[console]' "${attention[@]}" ${overrides[@]+"${overrides[@]}"}
