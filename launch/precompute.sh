#!/usr/bin/env bash
# Teachers' features of every training image, on a Slurm cluster: sbatch [options] launch/precompute.sh [PRESET] --out DIR [flags]
#
# Runs tools.precompute_features on a Ray cluster of all nodes. The same command goes on after an interruption.
# Large corpora: sbatch --array=0-63 --nodes=1 launch/precompute.sh ..., where each task makes its part of the shards.
# Ray has the GPUs and CPUs that the job has of each node, and the teachers' actors take what they are told to: two teachers on
# 4 nodes of 8 GPUs with --teachers.actors-per-teacher 16 --teachers.actor-gpus 1 --teachers.actor-cpus 8.
#SBATCH --job-name=cogvit-precompute
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
[[ -f launch/job.sh ]] || { echo "error: submit from the repository's root, not from $PWD" >&2 && exit 2; }
export RAY_GPUS=${RAY_GPUS:-${SLURM_GPUS_ON_NODE:-0}} RAY_CPUS=${RAY_CPUS:-${SLURM_CPUS_ON_NODE:-2}}
# shellcheck source=launch/job.sh
source launch/job.sh

progress() { { find "$OUT" -name '*.safetensors' 2>/dev/null || true; } | awk 'END { print NR " files" }'; } # they stay

read_flags stage1_cogvit_l "$@"
if [[ -n ${SLURM_ARRAY_TASK_ID:-} && " ${FLAGS[*]}" != *" --part"* ]]; then
    FLAGS+=(--part "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT")
    LOGS=$OUT/logs/$SLURM_ARRAY_TASK_ID
    mkdir -p "$LOGS"
fi
check_nodes
"${SRUN[@]}" --nodes=1 --ntasks=1 --nodelist="$HEAD" "$PYTHON" -m tools.precompute_features "$PRESET" "${FLAGS[@]}" \
    --dry-run || refused $? # before Ray is started
start_ray
run_step --nodes=1 --ntasks=1 --nodelist="$HEAD" --output="$LOGS/rank_%5t.log" --open-mode=append \
    "$PYTHON" -m tools.precompute_features "$PRESET" "${FLAGS[@]}" --teachers.ray-address "$RAY_ADDRESS"
finish "$STATUS"
