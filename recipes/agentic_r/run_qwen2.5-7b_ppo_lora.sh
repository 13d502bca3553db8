#!/usr/bin/env bash
# PPO of Qwen2.5-7B with LoRA adapters on the actor (the critic trains all its weights), 4 x 80 GB.
#   recipes/agentic_r/run_qwen2.5-7b_ppo_lora.sh --dry-run     prints the resolved configuration and the memory estimate, checks everything
#   recipes/agentic_r/run_qwen2.5-7b_ppo_lora.sh               trains; the same command with --resume goes on
# Variables and their defaults: launch.sh.
set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=ppo_7b.yaml
SETTINGS=(devices=4 lora_rank=64 lora_alpha=32 actor_lr=1e-5)
MODEL=${MODEL:-models/Qwen2.5-7B}
OUT=${OUT:-runs/agentic_r/lora/agent}
source "$recipe/launch.sh"
