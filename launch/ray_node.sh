#!/usr/bin/env bash
# One node of a job's Ray cluster: ray_node.sh PYTHON head|worker, with the settings of start_ray in the environment.
set -uo pipefail
address=$(getent ahostsv4 "$SLURMD_NODENAME" | awk '{ print $1; exit }')
# A rank has the GPU of its number; Ray gives those behind the ranks', where the node has so many.
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
if ((RAY_GPUS > 0 && ${#gpus[@]} >= ${RAY_BEHIND_GPUS:-0} + RAY_GPUS)); then
    behind=("${gpus[@]:${RAY_BEHIND_GPUS:-0}:RAY_GPUS}")
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${behind[*]}")
fi
# Bound to the job's address, with ports and files of the job's own, so that two jobs on a node never meet.
options=(
    --node-ip-address="$address" --temp-dir="$RAY_FILES-$SLURMD_NODENAME" --dashboard-agent-listen-port=0
    --num-cpus="$RAY_CPUS" --num-gpus="$RAY_GPUS" --object-store-memory="$RAY_STORE_BYTES"
    --include-log-monitor=false --log-color=false --block
)
# Preemption sends SIGTERM to every step at once. Ray blocks it, because the last training step still needs its teachers.
ray=(env -u RAY_ADDRESS --block-signal=TERM --block-signal=USR1 "$(dirname "$1")/ray" start "${options[@]}")

if [[ $2 == head ]]; then
    exec "${ray[@]}" --head --port="$RAY_PORT" --include-dashboard=false --ray-client-server-port=$((RAY_PORT + 10000))
fi
# A worker that came before the head, or lost its raylet, joins again.
until "${ray[@]}" --address="$RAY_ADDRESS"; do sleep 2; done
