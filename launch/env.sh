# shellcheck shell=bash
# Settings of the cluster scripts. Each can be set in the environment of sbatch instead: PYTHON=... sbatch launch/stage1.sh
# Nodes, tasks, GPUs, time and partition are the #SBATCH lines of the scripts; sbatch's own flags win over them.

# ---- software: a venv that every node sees, or a container
PYTHON=${PYTHON:-$PWD/.venv/bin/python}     # inside the container, if there is one
SRUN_FLAGS=${SRUN_FLAGS:-}                  # for every step; with pyxis: "--container-image=FILE --container-mounts=/data,/runs"

# ---- communication
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}  # a lost peer is an error, not a wait
# The network's own variables pass through as they are: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, GLOO_SOCKET_IFNAME, ...
MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 10000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1

# ---- GPUs: under --parallel.tp a message runs beside a product only if kernels start in the order of their launches. Megatron
# asks for one queue of them up to Hopper; Blackwell needs no such order, and 32 keep streams apart. Without tp, CUDA's own 8 stay.
TP_CONNECTIONS=${TP_CONNECTIONS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | awk '{ print ($1 >= 10 ? 32 : 1); exit }' || true)}

# ---- Ray, for the teachers of stage 1, precompute and --data.loading server; one cluster a job, seen by nobody else
RAY_PORT=${RAY_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
RAY_CPUS=${RAY_CPUS:-2}                     # CPUs of a node that Ray may give to actors (--teachers.actor-cpus); precompute: all
RAY_GPUS=${RAY_GPUS:-0}                     # GPUs of a node that Ray may give to actors (--teachers.actor-gpus); precompute: all
RAY_STORE_BYTES=${RAY_STORE_BYTES:-268435456}  # more for --data.loading server: the batches that a node's ranks have asked for
RAY_TMPDIR=${RAY_TMPDIR:-/tmp}              # on the node itself; short, for sockets are made in it
RAY_START_S=${RAY_START_S:-120}             # how long its start on all nodes may take
export RAY_USAGE_STATS_ENABLED=0

# ---- restarts
MAX_RESTARTS=${MAX_RESTARTS:-3}             # after failures without a new checkpoint in between
REQUEUE_TRIES=${REQUEUE_TRIES:-6}           # ten seconds apart, where the controller does not answer
NODE_FAILURES=${NODE_FAILURES:-2}           # a node on which so many attempts failed first is excluded ...
NODE_FAILURES_HOURS=${NODE_FAILURES_HOURS:-24} # ... if that was in so many hours
MAX_CLOCK_SKEW_S=${MAX_CLOCK_SKEW_S:-30}    # more is said, and changes nothing
