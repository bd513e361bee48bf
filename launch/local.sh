#!/usr/bin/env bash
# One machine, NPROC processes: launch/local.sh NPROC PRESET [flags of cogvit.train]
#                               launch/local.sh NPROC cogvit.evaluate RUN_OR_EXPORT [its flags]
#                               launch/local.sh NPROC tools.doctor [its flags]
#
# Starts the ranks itself, so that the exit status is the trainer's own (torchrun turns every failure into 1):
# 0 done, 2 a user's mistake, 75 stopped on request and wants to be started again. A rank that fails takes the others down.
set -euo pipefail

if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit $(($# < 2 ? 2 : 0))
fi
if ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC is the number of processes, not '$1'; for example launch/local.sh 2 demo_stage2" >&2
    exit 2
fi

NPROC=$1 MODULE=cogvit.train
shift
if [[ $1 =~ ^(cogvit|tools)(\.[a-z_]+)+$ ]]; then
    MODULE=$1
    shift
fi
PYTHON=${PYTHON:-python3}
# Local means local: what another launcher has left in the environment would send the ranks elsewhere.
unset SLURM_STEP_NUM_TASKS SLURM_PROCID SLURM_LOCALID
export WORLD_SIZE=$NPROC MASTER_ADDR=127.0.0.1
MASTER_PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}

pids=()
for ((rank = 0; rank < NPROC; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "$PYTHON" -m "$MODULE" "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT HUP
trap 'kill -USR1 "${pids[@]}" 2>/dev/null' USR1

status=0
while ((${#pids[@]} > 0)); do
    alive=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            alive+=("$pid")
            continue
        fi
        code=0
        wait "$pid" || code=$?
        ((status != 0)) || status=$code
    done
    pids=("${alive[@]}")
    if ((status != 0 && status != 75)); then kill -TERM "${pids[@]}" 2>/dev/null || true; fi
    sleep 0.2 || true # Ctrl-C ends it too
done
exit "$status"
