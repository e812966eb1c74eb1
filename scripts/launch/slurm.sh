#!/usr/bin/env bash
# One job on several nodes of a SLURM cluster: a launcher of Composer's on each. Asked to end (SIGTERM, five minutes before
# the time is up or the node is taken), the run saves, and the job queues up again and goes on.
#   sbatch --nodes=8 --time=24:00:00 scripts/launch/slurm.sh yamls/prune.yaml [section.key=value …]
#SBATCH --job-name=llmprune
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" || exit 2
if [ $# -eq 0 ]; then
  echo "usage: sbatch --nodes=N scripts/launch/slurm.sh YAML [section.key=value …]" >&2
  exit 2
fi
ranks="${SLURM_GPUS_ON_NODE:-8}"
export RANKS="$ranks" PORT="${PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
MAIN="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MAIN

# --kill-on-bad-exit: a rank that dies ends the job on all nodes.
srun --kill-on-bad-exit=1 bash -c '
  exec .venv/bin/composer -n "$RANKS" --world_size $((RANKS * SLURM_NNODES)) --node_rank "$SLURM_NODEID" \
    --base_rank $((RANKS * SLURM_NODEID)) --master_addr "$MAIN" --master_port "$PORT" \
    train.py "$@" run.autoresume=true' launch "$@"
code=$?
if [ "$code" -eq 75 ]; then
  echo "saved and left: queued up again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
