#!/usr/bin/env bash
# From an empty machine to a pruned Hugging Face model: sets up .venv and runs the whole journey on a small default.
#   bash scripts/quickstart.sh [--out runs/quickstart] [--seed 17]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"  # nothing is fetched: the corpus and the models are made here
exec .venv/bin/python scripts/quickstart.py "$@"
