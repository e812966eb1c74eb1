#!/usr/bin/env bash
# One job on several machines that share a folder and are reached by ssh: a launcher of Composer's on each. If one ends with
# an error, all are ended; Ctrl-C and SIGTERM let the run save and leave (exit code 75).
#   bash scripts/launch/ssh.sh "node1 node2" RANKS_PER_NODE yamls/prune.yaml [section.key=value …]
# The first machine must be reached by the others under its name, at port $PORT (default 29500). Every machine has this
# checkout at the same path; $SSH is the command that reaches one (default: ssh -o BatchMode=yes).
set -uo pipefail
if [ $# -lt 3 ]; then
  echo 'usage: bash scripts/launch/ssh.sh "node1 node2" RANKS_PER_NODE YAML [section.key=value …]' >&2
  exit 2
fi
read -r -a nodes <<< "$1"
ranks="$2"
shift 2
folder="$(cd "$(dirname "$0")/../.." && pwd)"
read -r -a reach <<< "${SSH:-ssh -o BatchMode=yes}"
job="llmprune-$$"
arguments="$(printf '%q ' "$@")"

# The remote shell tells its process group, by which a job is ended wherever the connection has gone.
start() { # number of the node, its name
  "${reach[@]}" "$2" "cd $(printf '%q' "$folder") && echo \$\$ > /tmp/$job.$1 && exec .venv/bin/composer -n $ranks \
    --world_size $((ranks * ${#nodes[@]})) --node_rank $1 --base_rank $((ranks * $1)) --master_addr ${MAIN:-${nodes[0]}} \
    --master_port ${PORT:-29500} train.py $arguments" &
}
tell() { # signal: to the ranks of every node
  for number in "${!nodes[@]}"; do
    "${reach[@]}" "${nodes[$number]}" "pkill -$1 -P \$(cat /tmp/$job.$number 2>/dev/null || echo 0)" 2>/dev/null
  done
}
asked=0
trap 'asked=1; tell TERM' TERM INT

for number in "${!nodes[@]}"; do start "$number" "${nodes[$number]}"; done
code=0
for _ in "${nodes[@]}"; do
  while true; do # a trap interrupts the wait
    wait -n
    one=$?
    [ "$one" -gt 128 ] && [ "$asked" -eq 1 ] && { asked=2; continue; }
    break
  done
  if [ "$one" -ne 0 ] && [ "$code" -eq 0 ]; then
    code="$one"
    [ "$code" -eq 75 ] || tell TERM # Composer's launchers give their ranks half a minute
  fi
done
for number in "${!nodes[@]}"; do "${reach[@]}" "${nodes[$number]}" "rm -f /tmp/$job.$number"; done
exit "$code"
