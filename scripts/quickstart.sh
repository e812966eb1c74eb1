#!/usr/bin/env bash
# From an empty machine to a smaller language model: sets up .venv, and prunes and recovers the built-in model.
#   bash scripts/quickstart.sh [--out runs/quickstart] [--minutes 8] [--seed 17]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"         # nothing is fetched: set-up brought the model
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}" # threads that wait longer leave the cores to other processes
exec .venv/bin/python scripts/quickstart.py "$@"
