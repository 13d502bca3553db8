#!/usr/bin/env bash
# As iteration 1 on NODES (default 2) machines of 8 x 80 GB; start Ray on all of them first (README).
#   recipes/agentic_r/run_qwen2.5-7b_ppo_multinode.sh --dry-run     prints the resolved configuration and the memory estimate, checks everything
#   recipes/agentic_r/run_qwen2.5-7b_ppo_multinode.sh               trains; the same command with --resume goes on
# Variables and their defaults: launch.sh.
set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=ppo_7b.yaml
SETTINGS=(nodes="${NODES:-2}")
MODEL=${MODEL:-models/Qwen2.5-7B}
OUT=${OUT:-runs/agentic_r/multinode/agent}
source "$recipe/launch.sh"
