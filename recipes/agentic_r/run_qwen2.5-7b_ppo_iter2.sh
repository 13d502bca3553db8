#!/usr/bin/env bash
# Iteration 2: PPO of iteration 1's agent; RETRIEVAL_URL serves the retriever trained on its data.
#   recipes/agentic_r/run_qwen2.5-7b_ppo_iter2.sh --dry-run     prints the resolved configuration and the memory estimate, checks everything
#   recipes/agentic_r/run_qwen2.5-7b_ppo_iter2.sh               trains; the same command with --resume goes on
# Variables and their defaults: launch.sh.
set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=ppo_7b.yaml
MODEL=${MODEL:-runs/agentic_r/iteration-1/agent/agent}
OUT=${OUT:-runs/agentic_r/iteration-2/agent}
source "$recipe/launch.sh"
