#!/usr/bin/env bash
# The launcher of one node, for the other scripts of this folder. SIGUSR1 asks its ranks to save and leave, for which they
# have as long as it takes; SIGTERM ends them within the 30 seconds that Composer's launcher gives.
#   bash scripts/launch/node.sh RANKS_PER_NODE NODES NUMBER_OF_THIS_NODE MAIN PORT YAML [section.key=value …]
set -uo pipefail
if [ $# -lt 6 ]; then
  echo "usage: bash scripts/launch/node.sh RANKS_PER_NODE NODES NUMBER MAIN PORT YAML [section.key=value …]" >&2
  exit 2
fi
ranks="$1" nodes="$2" number="$3" main="$4" port="$5"
shift 5
cd "$(dirname "$0")/../.." || exit 2
trap 'told=1; pkill -TERM -P "$launcher"' USR1
trap 'told=1; kill -TERM "$launcher"' TERM INT
# SLURM signals every process of a job: those below must not end by SIGUSR1.
(trap '' USR1 && exec .venv/bin/composer -n "$ranks" --world_size $((ranks * nodes)) --node_rank "$number" \
  --base_rank $((ranks * number)) --master_addr "$main" --master_port "$port" train.py "$@") &
launcher=$!
told=1
while [ "$told" -eq 1 ]; do # a signal interrupts the wait
  told=0
  wait "$launcher"
  code=$?
done
exit "$code"
