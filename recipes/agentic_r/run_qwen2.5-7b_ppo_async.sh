#!/usr/bin/env bash
# As iteration 1, but trajectories under way go on over weight updates (verl's colocate_async): no step waits for its slowest.
#   recipes/agentic_r/run_qwen2.5-7b_ppo_async.sh --dry-run     prints the resolved configuration and the memory estimate, checks everything
#   recipes/agentic_r/run_qwen2.5-7b_ppo_async.sh               trains; the same command with --resume goes on
# Trajectories are off-policy then, and verl corrects nothing by default (README).
# Variables and their defaults: launch.sh.
set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=ppo_7b.yaml
SETTINGS=(mode=colocate_async)
MODEL=${MODEL:-models/Qwen2.5-7B}
OUT=${OUT:-runs/agentic_r/async/agent}
source "$recipe/launch.sh"
