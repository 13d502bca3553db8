#!/usr/bin/env bash
# HotpotQA and 2WikiMultihopQA with SmolLM2-135M on a CPU: BM25, the base and the trained retriever, on both test sets:
#   AGENTIC_R_DATA=../shared/data recipes/hotpotqa_cpu/matrix.sh [OUT]
# Runs run.sh first (agent and retriever come from HotpotQA's training questions; 2WikiMultihopQA is transfer). Stopped
# at any point, the same command goes on. TEST: test questions of each set (default 164, all that 2WikiMultihopQA has).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-runs/hotpotqa_cpu}
data=${AGENTIC_R_DATA:-../shared/data}
agentic_r=${AGENTIC_R:-.venv/bin/agentic-r}
TEST=0 "$here/run.sh" "$out"

for which in base trained; do
  mkdir -p "$out/index/$which"
  ln -sfn "$(realpath "$out/index_$which")" "$out/index/$which/hotpotqa"
done
other=$data/2wikimultihopqa/corpus.jsonl
"$agentic_r" index --corpus "$other" --retriever builtin:minilm --out "$out/index/base/2wikimultihopqa" --resume
"$agentic_r" index --corpus "$other" --retriever "$out/retriever" --out "$out/index/trained/2wikimultihopqa" --resume
"$agentic_r" evaluate --config "$here/evaluate.yaml" --data-dir "$data" --out "$out/matrix" --first "${TEST:-164}" \
  "benchmarks=[hotpotqa,2wikimultihopqa]" agents.smollm2="$out/agent" \
  "searches.bm25=bm25:$data/{benchmark}/corpus.jsonl" \
  "searches.base=$out/index/base/{benchmark}" "searches.trained=$out/index/trained/{benchmark}" --resume
