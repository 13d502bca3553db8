#!/usr/bin/env bash
# GRPO of Qwen2.5-7B, no critic, one machine of 8 x 80 GB.
#   recipes/agentic_r/run_qwen2.5-7b_grpo.sh --dry-run     prints the resolved configuration and the memory estimate, checks everything
#   recipes/agentic_r/run_qwen2.5-7b_grpo.sh               trains; the same command with --resume goes on
# Variables and their defaults: launch.sh.
set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=grpo_7b.yaml
MODEL=${MODEL:-models/Qwen2.5-7B}
OUT=${OUT:-runs/agentic_r/grpo/agent}
source "$recipe/launch.sh"
