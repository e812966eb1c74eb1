#!/usr/bin/env bash
# Set up .venv and run every check: format, lint, types, layers, tests. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
source .venv/bin/activate
ruff format --check .
ruff check .
mypy llmprune data_prep train.py scripts/*.py
lint-imports
python -m pytest "$@"
