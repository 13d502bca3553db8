#!/usr/bin/env bash
# HotpotQA and 2WikiMultihopQA with SmolLM2-135M on a CPU: BM25, the base and the trained retriever, on both test sets:
#   AGENTIC_R_DATA=DATA recipes/hotpotqa_cpu/matrix.sh [OUT]
# Runs run.sh first (agent and retriever come from HotpotQA's training questions; 2WikiMultihopQA is transfer). Stopped
# at any point, the same command goes on. TEST: the first test questions of each set (default 164, all that 2WikiMultihopQA
# has), or `all`.
# SECOND: another retriever, as NAME=FOLDER, before and after training on the same groups, in OUT/matrix_NAME:
#   SECOND=e5=runs/e5-small      # made by recipes/retriever/prepare_e5_small.py
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-runs/hotpotqa_cpu}
data=${AGENTIC_R_DATA:?the folder that holds hotpotqa/ in FlashRAG layout}
agentic_r=${AGENTIC_R:-.venv/bin/agentic-r}
TEST=0 "$here/run.sh" "$out"

other=$data/2wikimultihopqa/corpus.jsonl
evaluate() {  # evaluate OUT SEARCH...: the agent with each search, on both test sets
  local matrix=$1 more=(--resume)
  [ "${TEST:-164}" = all ] || more+=(--first "${TEST:-164}")
  shift
  "$agentic_r" evaluate --config "$here/evaluate.yaml" --data-dir "$data" --out "$matrix" "${more[@]}" \
    "benchmarks=[hotpotqa,2wikimultihopqa]" agents.smollm2="$out/agent" "$@"
}

for which in base trained; do
  mkdir -p "$out/index/$which"
  ln -sfn "$(realpath "$out/index_$which")" "$out/index/$which/hotpotqa"
done
"$agentic_r" index --corpus "$other" --retriever builtin:minilm --out "$out/index/base/2wikimultihopqa" --resume
"$agentic_r" index --corpus "$other" --retriever "$out/retriever" --out "$out/index/trained/2wikimultihopqa" --resume
evaluate "$out/matrix" "searches.bm25=bm25:$data/{benchmark}/corpus.jsonl" \
  "searches.base=$out/index/base/{benchmark}" "searches.trained=$out/index/trained/{benchmark}"

[ -n "${SECOND:-}" ] || exit 0
name=${SECOND%%=*} base=${SECOND#*=}
"$agentic_r" train-retriever --config "$here/retriever.yaml" --groups "$out/groups.jsonl" \
  --corpus "$data/hotpotqa/corpus.jsonl" --out "$out/retriever_$name" retriever="$base" --resume
for set in hotpotqa 2wikimultihopqa; do
  for which in "$name=$base" "${name}_trained=$out/retriever_$name"; do
    "$agentic_r" index --corpus "$data/$set/corpus.jsonl" --retriever "${which#*=}" --out "$out/index/${which%%=*}/$set" --resume
  done
done
evaluate "$out/matrix_$name" "searches.$name=$out/index/$name/{benchmark}" \
  "searches.${name}_trained=$out/index/${name}_trained/{benchmark}"
