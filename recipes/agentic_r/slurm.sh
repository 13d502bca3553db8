#!/usr/bin/env bash
#SBATCH --job-name=agentic-r
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --signal=B:TERM@120
# One of this folder's run_*.sh under Slurm, on one node or, with a Ray cluster over all of them, on several:
#   sbatch recipes/agentic_r/slurm.sh recipes/agentic_r/run_qwen2.5-7b_ppo_iter1.sh
#   sbatch --nodes=2 recipes/agentic_r/slurm.sh recipes/agentic_r/run_qwen2.5-7b_ppo_multinode.sh
# Further arguments go to the script. A job that is submitted again goes on (--resume). INDEX is the folder of an index to
# serve on the first node; without it, RETRIEVAL_URL names a service that runs. On several nodes the service wants a token:
# RETRIEVAL_TOKEN is exported before sbatch. The folder of the submission is on a disk that all nodes see.
# Checked with shellcheck; not run under Slurm here.
set -euo pipefail
script=${1:?the run_*.sh to start}
shift
head=$(hostname)
port=${RAY_PORT:-6379}
service_port=${SERVICE_PORT:-8000}
alive=1
started=()

stop() {
  ((${#started[@]} == 0)) || kill "${started[@]}" 2>/dev/null || true
  ((SLURM_NNODES == 1)) || ray stop --force >/dev/null 2>&1 || true
}
trap stop EXIT

if ((SLURM_NNODES > 1)); then
  export NODES=$SLURM_NNODES
  export RETRIEVAL_TOKEN=${RETRIEVAL_TOKEN:?any secret, the same for the service and the trainers}
  export RETRIEVAL_TOKEN_ENV=RETRIEVAL_TOKEN
  ray start --head --port="$port" --num-gpus="${SLURM_GPUS_ON_NODE:-8}" --disable-usage-stats
  srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
    ray start --address="$head:$port" --num-gpus="${SLURM_GPUS_ON_NODE:-8}" --disable-usage-stats --block &
  workers=$!
  started+=("$workers")
  until ((alive >= SLURM_NNODES)); do
    kill -0 "$workers" # ends the job where a node could not join
    sleep 5
    alive=$(ray list nodes --filter state=ALIVE --format json | python3 -c 'import json, sys; print(len(json.load(sys.stdin)))')
  done
fi

if [[ -n ${INDEX:-} ]]; then
  listen=(--port "$service_port")
  address=127.0.0.1
  if ((SLURM_NNODES > 1)); then
    listen+=(--host 0.0.0.0 --token-env RETRIEVAL_TOKEN)
    address=$head
  fi
  "${AGENTIC_R:-agentic-r}" serve --index "$INDEX" "${listen[@]}" &
  service=$!
  started+=("$service")
  until curl -sf "http://127.0.0.1:$service_port/ready" >/dev/null; do
    kill -0 "$service" # ends the job where the service could not start
    sleep 5
  done
  export RETRIEVAL_URL="http://$address:$service_port"
fi

bash "$script" --resume "$@" &
training=$!
started+=("$training")
wait "$training"
