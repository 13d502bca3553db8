#!/usr/bin/env bash
# What only an accelerator can show, in order of value, in at most 10 minutes on one GPU (Ampere or newer):
#   tests/gpu/run.sh [--out runs/gpu] [--minutes 10] [--only NAME ...]
# Every check has an expected outcome; one whose packages are missing is skipped with the reason. Results: OUT/results.json
# and OUT/results.md. Without a GPU the checks run in a small form, which tests the script and measures nothing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
exec "${PYTHON:-python3}" -m tests.gpu.checks "$@"
