#!/usr/bin/env bash
# One run in several processes on this machine: launch/local_processes.sh COUNT COMMAND …
#
#   launch/local_processes.sh 2 maxstack train configs/pretrain/tiny.py --mesh.fsdp 2
#
# Each process takes the devices that it finds: on a CPU one, or as many as are simulated
# (XLA_FLAGS=--xla_force_host_platform_device_count=4). SIGINT and SIGTERM go to all. When a process fails the others
# are told to stop, and its exit code is the script's.
set -u

usage() {
  echo "usage: $0 COUNT COMMAND …   ($1)" >&2
  exit 2
}
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || usage "COUNT is ${1:-missing}; give a number of processes, at least 1"
count=$1
shift
(($#)) || usage "no command given"

export MAXSTACK_PROCESSES=$count
export MAXSTACK_COORDINATOR=127.0.0.1:${MAXSTACK_PORT:-$((20000 + RANDOM % 20000))}

running=()
all() { ((${#running[@]})) && kill "-$1" "${running[@]}" 2>/dev/null; }
trap 'all INT' INT
trap 'all TERM' TERM

for ((process = 0; process < count; process++)); do
  MAXSTACK_PROCESS=$process "$@" &
  running+=($!)
done

# Looked at in turn: `wait -n` tells no reliable story of processes that ended before it was called.
code=0
while ((${#running[@]})); do
  left=()
  failed=0
  for child in "${running[@]}"; do
    if kill -0 "$child" 2>/dev/null; then
      left+=("$child")
    else
      wait "$child" || failed=$?
    fi
  done
  running=("${left[@]}")
  if ((failed && !code)); then
    code=$failed
    all TERM
  fi
  ((${#running[@]})) && sleep 0.2
done
exit "$code"
