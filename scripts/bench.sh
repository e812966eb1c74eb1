#!/usr/bin/env bash
# Measure llmprune against what it could at best be: prints a table and writes runs/bench/bench.json.
#   bash scripts/bench.sh [--only gated_step,data_prep] [--runs N]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export HF_HUB_OFFLINE=1
exec .venv/bin/python scripts/bench.py "$@"
