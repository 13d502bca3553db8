#!/usr/bin/env bash
# K = 1, 2, 3 and the ablations with several seeds, and their tables over seeds and questions:
#   recipes/experiments/seeds.sh [OUT] [SEED...]      (default: runs/seeds 0 10 20)
# A seed decides PPO, data and retriever training (iteration k takes seed + k - 1, so seeds stand ten apart); world,
# questions and the warm-started agent are the same for all, so that seeds are paired over questions. Stopped at any point,
# the same command goes on. KEYS: more settings of the loop.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-runs/seeds}
shift || true
seeds=("$@")
[ ${#seeds[@]} -gt 0 ] || seeds=(0 10 20)
agentic_r=${AGENTIC_R:-.venv/bin/agentic-r}

for seed in "${seeds[@]}"; do
  run=$out/$seed/loop
  # shellcheck disable=SC2086
  "$agentic_r" iterate --config "$here/loop_k3.yaml" --resume out="$run" seed="$seed" world.seed=0 ${KEYS:-}
  for name in iterations ablations; do
    "$agentic_r" experiment --config "$here/$name.yaml" --resume run="$run" out="$out/$seed/$name"
  done
done
[ ${#seeds[@]} -gt 1 ] || exit 0
for name in iterations ablations; do
  folders=$(printf ",$out/%s/$name" "${seeds[@]}")
  "$agentic_r" aggregate --resume --out "$out/$name" "runs=[${folders:1}]"
done
