#!/usr/bin/env bash
# Stage 4 on a Slurm cluster: sbatch [options] launch/rl.sh [PRESET] [flags of cogvit.train], from the repository's root.
#
# The same command resumes, on the same layout or another. Before the time limit, on preemption and after a failure the job
# saves, requeues itself and goes on. Logs: --out/logs/rank_*.log. Settings: the lines below, or sbatch's flags, and env.sh.
# The actors that answer (--rl.actors) get CPUs and GPUs of the job's own Ray cluster (RAY_CPUS, RAY_GPUS): GPUs of their own
# where a node has more of them than ranks (RAY_GPUS=4 sbatch --ntasks-per-node=4 --gpus-per-node=8 launch/rl.sh ...). Weights
# go through its object store (RAY_STORE_BYTES), in fp32, --rl.max-staleness and two copies; what it lacks takes the disk.
# Many runs at once: sbatch --array=0-3 launch/rl.sh demo_rl --seed {task} --out runs/sweep/{task}
#SBATCH --job-name=cogvit-rl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
[[ -f launch/job.sh ]] || { echo "error: submit from the repository's root, not from $PWD" >&2 && exit 2; }
# shellcheck source=launch/job.sh
source launch/job.sh

read_flags rl_glm4_9b "$@"
check_nodes
check_flags
if needs_ray; then
    start_ray
    FLAGS+=(--teachers.ray-address "$RAY_ADDRESS")
fi
train
finish "$STATUS"
