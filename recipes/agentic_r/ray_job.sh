#!/usr/bin/env bash
# One of this folder's run_*.sh as a job of a Ray cluster that runs already (KubeRay, Anyscale, `ray start`):
#   RAY_ADDRESS=http://HEAD:8265 recipes/agentic_r/ray_job.sh run_qwen2.5-7b_ppo_multinode.sh [field=value ...]
# Set NODES, MODEL, TRAIN, VAL, OUT and RETRIEVAL_URL as for the script; paths are of the cluster, on a disk that all its
# machines see, and the package is installed on them. The service's token is in the machines' own environment: only its
# variable's name (RETRIEVAL_TOKEN_ENV) is sent. A job that is submitted again goes on.
# Checked with shellcheck; not run on a cluster here.
set -euo pipefail
script=${1:?the run_*.sh to start}
shift
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${RAY_ADDRESS:?the address of the cluster\'s dashboard, http://HEAD:8265}"
variables=$(python3 - <<'PYTHON'
import json, os
names = ("NODES", "MODEL", "TRAIN", "VAL", "OUT", "PRESET", "ENGINE", "RETRIEVAL_URL", "RETRIEVAL_TOKEN_ENV")
print(json.dumps({"env_vars": {name: os.environ[name] for name in names if name in os.environ}}))
PYTHON
)
exec ray job submit --address "$RAY_ADDRESS" --working-dir "$recipe" --runtime-env-json "$variables" \
  --entrypoint-num-cpus 1 -- bash "$(basename "$script")" --resume "$@"
