#!/usr/bin/env bash
# Iteration 1: PPO of Qwen2.5-7B with the base retriever (E5), one machine of 8 x 80 GB.
#   recipes/agentic_r/run_qwen2.5-7b_ppo_iter1.sh --dry-run     prints the resolved configuration and the memory estimate, checks everything
#   recipes/agentic_r/run_qwen2.5-7b_ppo_iter1.sh               trains; the same command with --resume goes on
# Variables and their defaults: launch.sh.
set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=ppo_7b.yaml
MODEL=${MODEL:-models/Qwen2.5-7B}
OUT=${OUT:-runs/agentic_r/iteration-1/agent}
source "$recipe/launch.sh"
