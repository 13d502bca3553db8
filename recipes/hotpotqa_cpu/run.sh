#!/usr/bin/env bash
# HotpotQA with SmolLM2-135M on a CPU, from the package on PyPI to the table: recipes/hotpotqa_cpu/run.sh [OUT]
# Run it from the checkout. Stopped at any point, the same command goes on; what is done is not done again.
# AGENTIC_R_DATA: folder that holds hotpotqa/ in FlashRAG layout (required).
# QUESTIONS: training questions that data are made from (default 100, at most 240). TEST: test questions (default 100;
# 0: stop before the evaluation).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-runs/hotpotqa_cpu}
data=${AGENTIC_R_DATA:?the folder that holds hotpotqa/ in FlashRAG layout}
corpus=$data/hotpotqa/corpus.jsonl
agentic_r=${AGENTIC_R:-.venv/bin/agentic-r}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"

step() {  # step NAME COMMAND...: run it and note its wall and processor seconds
  local name=$1 TIMEFORMAT='%R %U %S'
  shift
  echo "== $name" >&2
  { time "$@" 1>&3 2>&4; } 3>&1 4>&2 2>"$out/.time"
  printf '%s\t%s\n' "$name" "$(cat "$out/.time")" >>"$out/seconds.tsv"
}

# The agent: 135 M parameters, taught the form of the protocol on the first 160 training questions.
step model "$python" "$here/prepare_model.py" "$out/smollm2"
step warm-start "$python" -m recipes.hotpotqa_cpu.warm_start --config "$here/warm_start.yaml" --model "$out/smollm2" \
  --questions "$data/hotpotqa/train.jsonl" --corpus "$corpus" --out "$out/agent" --resume
step index-base "$agentic_r" index --corpus "$corpus" --retriever builtin:minilm --out "$out/index_base" --resume

# Data construction on other training questions.
tail -n +161 "$data/hotpotqa/train.jsonl" >"$out/questions.jsonl"
agent=(llm.model="$out/agent" search.index="$out/index_base" --resume)
step trajectories "$agentic_r" trajectories --config "$here/rollouts.yaml" \
  --in "$out/questions.jsonl" --out "$out/trajectories.jsonl" --num-questions "${QUESTIONS:-100}" "${agent[@]}"
step candidates "$agentic_r" candidates protocol=compact \
  --in "$out/trajectories.jsonl" --out "$out/candidates.jsonl" search.index="$out/index_base" --resume
step relevance "$agentic_r" relevance --scorer gold_documents --questions "$out/questions.jsonl" \
  --candidates "$out/candidates.jsonl" --corpus "$corpus" --out "$out/relevance.jsonl" --resume
step correctness "$agentic_r" correctness --config "$here/rollouts.yaml" --candidates "$out/candidates.jsonl" \
  --relevance "$out/relevance.jsonl" --corpus "$corpus" --out "$out/correctness.jsonl" "${agent[@]}"
step groups "$agentic_r" groups --candidates "$out/candidates.jsonl" --relevance "$out/relevance.jsonl" \
  --correctness "$out/correctness.jsonl" --out "$out/groups.jsonl" --resume

# The retriever.
step train-retriever "$agentic_r" train-retriever --config "$here/retriever.yaml" --groups "$out/groups.jsonl" \
  --corpus "$corpus" --out "$out/retriever" --resume
step index-trained "$agentic_r" index --corpus "$corpus" --retriever "$out/retriever" --out "$out/index_trained" --resume

# The comparison: one agent, the base and the trained retriever, unseen questions.
[ "${TEST:-100}" != 0 ] || exit 0
step evaluate "$agentic_r" evaluate --config "$here/evaluate.yaml" --data-dir "$data" --out "$out/evaluation" \
  --first "${TEST:-100}" agents.smollm2="$out/agent" \
  searches.base="$out/index_base" searches.trained="$out/index_trained" --resume
