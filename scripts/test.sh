#!/usr/bin/env bash
# Set up .venv and run every check: format, lint, types, layers, tests. Further arguments go to pytest.
#   bash scripts/test.sh --fast     the quick part of the tests: plans, pruning, families, configs, data
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
source .venv/bin/activate
ruff format --check .
ruff check .
mypy llmprune data_prep train.py scripts/*.py studies/*.py studies/heads/*.py studies/small/*.py studies/ladder/*.py
lint-imports
if [ "${1:-}" = "--fast" ]; then
  shift
  set -- tests/plans tests/pruning tests/models/families tests/config tests/data "$@"
fi
# Two files at a time, the longest first, each on one core: small models are no faster on more.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
