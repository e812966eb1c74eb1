#!/usr/bin/env bash
# One job on several nodes of a SLURM cluster: a launcher of Composer's on each. Five minutes before its time is up (and when
# it is pre-empted, where the cluster has PreemptParameters=send_user_signal) the run saves, and the job queues up again and
# goes on. Submit it from a checkout that all nodes see, with .venv in it:
#   sbatch --nodes=8 --time=24:00:00 scripts/launch/slurm.sh JOB.yaml [section.key=value …]
#SBATCH --job-name=llmprune
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" || exit 2
if [ $# -eq 0 ]; then
  echo "usage: sbatch --nodes=N scripts/launch/slurm.sh YAML [section.key=value …]" >&2
  exit 2
fi
export RANKS="${SLURM_GPUS_ON_NODE:-8}" PORT="${PORT:-$((20000 + SLURM_JOB_ID % 20000))}" SAVED="$PWD/.saved-$SLURM_JOB_ID"
MAIN="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MAIN
rm -f "$SAVED" # of an earlier start that was cut off

# --kill-on-bad-exit: a rank that dies ends the job on all nodes; one node that has saved does not, others may still be busy.
srun --kill-on-bad-exit=1 --cpu-bind=none bash -c '
  trap true USR1
  bash scripts/launch/node.sh "$RANKS" "$SLURM_NNODES" "$SLURM_NODEID" "$MAIN" "$PORT" "$@" run.autoresume=true
  code=$?
  [ "$code" -eq 75 ] && touch "$SAVED" && exit 0
  exit "$code"' launch "$@"
code=$?
if [ -e "$SAVED" ]; then
  rm "$SAVED"
  [ "$code" -ne 0 ] && exit "$code"
  echo "saved and left: queued up again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
fi
exit "$code"
