#!/usr/bin/env bash
# Fewer blocks with richer heads, or more plain ones? Trains eight models and compares them; goes on where it was stopped.
#   bash studies/heads/run.sh [--size small|published] [--data DATA] [--prompts FILE] [--out runs/study_heads]
set -euo pipefail
cd "$(dirname "$0")/../.."
bash scripts/setup.sh
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec .venv/bin/python studies/heads/study.py "$@"
