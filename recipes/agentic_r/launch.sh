# shellcheck shell=bash disable=SC2154  # sourced: recipe, CONFIG and the others are the caller's
# Shared by the run_*.sh of this folder: from environment variables to one call of `agentic-r train-agent`.
# Before sourcing it, a script sets CONFIG (a YAML file of this folder), OUT and MODEL, and may set SETTINGS (field=value).
#
# MODEL          folder of the agent to start from (Hugging Face format)
# TRAIN, VAL     files of prepare_data.py (default data/train.parquet, data/validation.parquet); VAL= for no validation
# RETRIEVAL_URL  retrieval service (agentic-r serve), default http://127.0.0.1:8000
# RETRIEVAL_TOKEN_ENV  name of the variable that holds the service's token, where it wants one (serve --token-env)
# OUT            folder of the run; the trained agent is in $OUT/agent
# PRESET         paper (default) or released_code
# ENGINE         vllm (default); verl 0.9.1 cannot be installed with sglang
# All further arguments go to train-agent: --dry-run, --resume, field=value, and verl's own overrides.
train=${TRAIN-data/train.parquet}
validation=${VAL-data/validation.parquet}
arguments=(
  --config "$recipe/$CONFIG"
  --preset "${PRESET:-paper}"
  --engine "${ENGINE:-vllm}"
  --model "$MODEL"
  --questions "$train"
  --retrieval-url "${RETRIEVAL_URL:-http://127.0.0.1:8000}"
  --out "$OUT"
  --no-cpu
)
if [[ -n $validation ]]; then
  arguments+=(--validation "$validation")
fi
if [[ -n ${RETRIEVAL_TOKEN_ENV:-} ]]; then
  arguments+=(--retrieval-token-env "$RETRIEVAL_TOKEN_ENV")
fi
exec "${AGENTIC_R:-agentic-r}" train-agent "${arguments[@]}" ${SETTINGS[@]+"${SETTINGS[@]}"} "$@"
