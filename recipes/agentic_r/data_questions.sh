#!/usr/bin/env bash
# HotpotQA's and TriviaQA's questions as one benchmark: recipes/agentic_r/data_questions.sh DATA OUT
# DATA holds hotpotqa/ and triviaqa/ in FlashRAG layout. Ids get the data set's name, so that none occurs twice.
set -euo pipefail
data=$1 out=$2
mkdir -p "$out"
for split in train dev test; do
  : >"$out/.$split.jsonl"
  for name in hotpotqa triviaqa; do
    file=$data/$name/$split.jsonl
    [ -f "$file" ] || continue
    python3 - "$name" "$file" >>"$out/.$split.jsonl" <<'PYTHON'
import json
import sys

name, path = sys.argv[1:]
with open(path, encoding="utf-8") as stream:
    for line in stream:
        if line.strip():
            row = json.loads(line)
            print(json.dumps(row | {"id": f"{name}/{row['id']}"}, ensure_ascii=False))
PYTHON
  done
  [ -s "$out/.$split.jsonl" ] || cp "$out/.dev.jsonl" "$out/.$split.jsonl"
done
for split in train dev test; do mv "$out/.$split.jsonl" "$out/$split.jsonl"; done
wc -l "$out"/*.jsonl
