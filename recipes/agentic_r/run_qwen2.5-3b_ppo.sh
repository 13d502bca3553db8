#!/usr/bin/env bash
# PPO of Qwen2.5-3B on 4 x 80 GB.
#   recipes/agentic_r/run_qwen2.5-3b_ppo.sh --dry-run     prints the resolved configuration and the memory estimate, checks everything
#   recipes/agentic_r/run_qwen2.5-3b_ppo.sh               trains; the same command with --resume goes on
# Variables and their defaults: launch.sh.
set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=ppo_3b.yaml
MODEL=${MODEL:-models/Qwen2.5-3B}
OUT=${OUT:-runs/agentic_r/3b/agent}
source "$recipe/launch.sh"
