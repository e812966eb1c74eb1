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

# The remote shell tells its process, by which a job is asked and ended wherever the connection has gone.
start() { # number of the node, its name
  "${reach[@]}" "$2" "echo \$\$ > /tmp/$job.$1 && exec bash $(printf '%q' "$folder")/scripts/launch/node.sh $ranks ${#nodes[@]} $1 \
    ${MAIN:-${nodes[0]}} ${PORT:-29500} $arguments" &
}
tell() { # signal: to the launcher's script on every node
  for number in "${!nodes[@]}"; do
    "${reach[@]}" "${nodes[$number]}" "kill -$1 \$(cat /tmp/$job.$number)" 2>/dev/null
  done
}
asked=0
trap 'asked=1; tell USR1' TERM INT

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
