# shellcheck shell=bash
# shellcheck disable=SC2034  # PRESET, STATUS and RAY_ADDRESS are for the scripts that source this one
# What the batch scripts share. A script sources it in the directory of the submission and calls, in this order:
#   read_flags DEFAULT_PRESET "$@";  check_nodes;  start_ray;  train or another run_step;  finish STATUS
# Statuses: 0 done; 2 a mistake of the user's, not tried again; 75 stopped on request; anything else a failure.
# shellcheck source=launch/env.sh
source launch/env.sh

asked=     # what asked the job to stop
step_pid=  # of the srun that does the work
ray_pids=() # of the sruns that hold Ray; the head's first
# shellcheck disable=SC2206  # SRUN_FLAGS is a list of words
SRUN=(srun --overlap $SRUN_FLAGS)

say() { echo "$(date +%T) $*"; }

die() {
    echo "error: $*" >&2
    exit 2
}

# Sets PRESET, FLAGS and OUT. In a job array, {task} in a flag stands for the task's number: --seed {task} --out runs/{task}
read_flags() {
    PRESET=$1 FLAGS=()
    shift
    if (($#)) && [[ $1 != --* ]]; then
        PRESET=$1
        shift
    fi
    OUT=runs/$PRESET
    local word previous=
    for word in "$@"; do
        word=${word//\{task\}/${SLURM_ARRAY_TASK_ID:-0}}
        if [[ $previous == --out ]]; then OUT=$word; fi
        if [[ $word == --out=* ]]; then OUT=${word#--out=}; fi
        FLAGS+=("$word")
        previous=$word
    done
    FLAGS+=(--out "$OUT")
    LOGS=$OUT/logs
    TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
    NODES=$SLURM_JOB_NUM_NODES
    WORLD=$((NODES * TASKS_PER_NODE))
    unset SLURM_NTASKS_PER_NODE # or every step below would have to obey it
    trap 'ask_to_stop "the time limit is near"' USR1
    trap 'ask_to_stop "SIGTERM"' TERM
    trap 'ask_to_stop "SIGINT"' INT
}

# Signals go on to the step's tasks; a second one makes them leave at once.
ask_to_stop() {
    asked=$1
    say "stopping: $asked"
    if [[ -n $step_pid ]]; then kill -USR1 "$step_pid" 2>/dev/null || true; fi
}

# Sets ORDER (nodes in the order of the switches), HEAD and HEAD_ADDRESS, and writes the host of every rank to HOSTS.
# Refuses what cannot run: a node without the software or the output, a layout that the nodes do not fit.
check_nodes() {
    local found before after name seconds
    before=$(date +%s)
    # A failed check must not leave the job waiting for the other nodes'.
    found=$("${SRUN[@]}" --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        bash launch/check_node.sh "$PYTHON" "$OUT") || exit 2
    after=$(date +%s)
    found=$(sort --version-sort <<<"$found")
    mapfile -t ORDER < <(awk '{ print $2 }' <<<"$found")
    HEAD=${ORDER[0]} HEAD_ADDRESS=$(awk '{ print $3; exit }' <<<"$found")
    HOSTS=$LOGS/hosts.$SLURM_JOB_ID
    for name in "${ORDER[@]}"; do
        for ((task = 0; task < TASKS_PER_NODE; task++)); do echo "$name"; done
    done >"$HOSTS"
    while read -r _ name _ seconds; do
        if ((seconds < before - MAX_CLOCK_SKEW_S || seconds > after + MAX_CLOCK_SKEW_S)); then
            say "warning: the clock of $name is $((seconds - after)) s off; times in logs will not agree"
        fi
    done <<<"$found"
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $WORLD ranks on ${ORDER[*]}, output in $OUT"
}

# Sets TP, PP, TEACHERS and LOADING from the resolved configuration; a mistake in it ends the job here.
check_flags() {
    local resolved
    resolved=$(RANK=0 WORLD_SIZE=$WORLD "${SRUN[@]}" --nodes=1 --ntasks=1 --nodelist="$HEAD" \
        "$PYTHON" -m cogvit.train "$PRESET" "${FLAGS[@]}" --dry-run) || exit 2
    read -r TP PP TEACHERS LOADING < <("${SRUN[@]}" --nodes=1 --ntasks=1 --nodelist="$HEAD" "$PYTHON" -c '
import json, sys
run = json.loads(sys.argv[1])
teachers = run["teachers"]["source"] if run["objective"] == "distill" else "none"
print(run["parallel"]["tp"], run["parallel"]["pp"], teachers, run["data"]["loading"])
' "$resolved")
    ((TASKS_PER_NODE % TP == 0)) ||
        die "--parallel.tp $TP does not divide $TASKS_PER_NODE tasks per node: tensor ranks would sit on two nodes"
    say "$PRESET at tp=$TP pp=$PP dp=$((WORLD / TP / PP)), teachers: $TEACHERS, loading: $LOADING"
}

# Whether the run that check_flags looked at talks to Ray.
needs_ray() { [[ $TEACHERS == *online* || $LOADING == server ]]; }

# Starts a Ray cluster on the job's nodes, with a token of its own, and waits until all are in it; sets RAY_ADDRESS.
start_ray() {
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH
    RAY_AUTH_TOKEN_PATH=$(realpath "$LOGS")/.ray-token.$SLURM_JOB_ID
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
    RAY_ADDRESS=$HEAD_ADDRESS:$RAY_PORT
    export RAY_FILES=$RAY_TMPDIR/cogvit-ray-$SLURM_JOB_ID RAY_PORT RAY_ADDRESS RAY_CPUS RAY_GPUS RAY_STORE_BYTES
    rm -f "$LOGS"/ray-*.log
    local ray=("${SRUN[@]}" --kill-on-bad-exit=0 --cpu-bind=none) end=$((SECONDS + RAY_START_S)) others=$((NODES - 1))
    start_head() {
        "${ray[@]}" --nodes=1 --ntasks=1 --nodelist="$HEAD" bash launch/ray_node.sh "$PYTHON" head >>"$LOGS/ray-head.log" 2>&1 &
        ray_pids[0]=$!
    }
    start_head
    if ((others > 0)); then
        "${ray[@]}" --nodes=$others --ntasks=$others --ntasks-per-node=1 --exclude="$HEAD" \
            bash launch/ray_node.sh "$PYTHON" worker >"$LOGS/ray-workers.log" 2>&1 &
        ray_pids+=("$!")
    fi
    until (($(cat "$LOGS"/ray-*.log | grep -c 'Ray runtime started') >= NODES)); do
        if ((SECONDS > end)); then
            say "Ray did not start on all nodes in $RAY_START_S s: see $LOGS/ray-head.log and ray-workers.log"
            stop_ray
            finish 1
        fi
        if ! kill -0 "${ray_pids[0]}" 2>/dev/null; then # Ray gives itself 30 s, which is short on a busy node
            say "Ray's head did not start; once more"
            start_head
        fi
        sleep 0.5
    done
    say "Ray is on $NODES nodes, its head at $RAY_ADDRESS"
}

# Runs the trainer on every rank, tensor ranks inside a node and pipeline neighbors under a switch; sets STATUS.
train() {
    export MASTER_ADDR=$HEAD_ADDRESS MASTER_PORT
    SLURM_HOSTFILE=$HOSTS run_step --ntasks="$WORLD" --distribution=arbitrary --kill-on-bad-exit=1 \
        --output="$LOGS/rank_%5t.log" --open-mode=append "$PYTHON" -m cogvit.train "$PRESET" "${FLAGS[@]}"
}

# Runs the step that does the job's work and waits for its end; sets STATUS. Ray's end asks the step to save and stop.
run_step() {
    local ended
    "${SRUN[@]}" "$@" 2> >(tee "$LOGS/srun.$SLURM_JOB_ID" >&2) &
    step_pid=$!
    if [[ -n $asked ]]; then ask_to_stop "$asked"; fi # it came before there was a step to tell
    while true; do
        STATUS=0 ended=
        wait -n -p ended "$step_pid" "${ray_pids[@]:0:1}" || STATUS=$?
        if [[ ${ended:-} == "$step_pid" ]]; then break; fi
        if [[ -n ${ended:-} ]]; then # else a signal ended the wait
            say "Ray's head is gone; the ranks are asked to save"
            ray_pids=("${ray_pids[@]:1}")
            kill -USR1 "$step_pid" 2>/dev/null || true
        fi
    done
    stop_ray
}

# Ends Ray's steps now; at the job's end they would be sent SIGTERM, which they block, and waited for.
stop_ray() {
    ((${#ray_pids[@]} > 0)) || return 0
    kill -QUIT "${ray_pids[@]}" 2>/dev/null || true
    wait "${ray_pids[@]}" 2>/dev/null || true
    ray_pids=()
    timeout 20 "${SRUN[@]}" --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        bash -c "rm -rf $RAY_FILES-\$SLURMD_NODENAME" 2>/dev/null || true
}

# Ends the job with what its status asks for: done, refused, or another start.
finish() {
    local status=$1 newest tried=0 before=none node first
    rm -f "${RAY_AUTH_TOKEN_PATH:-}"
    if ((status == 0)); then
        say "done"
        exit 0
    fi
    # srun names the tasks that failed, the first one first; its status is the highest, so that of tasks it took down.
    first=$(grep -m 1 '^srun: error: [^ ]*: tasks\? [0-9,-]*: ' "$LOGS/srun.$SLURM_JOB_ID" 2>/dev/null || true)
    if [[ $first == *"exit code "* ]]; then status=${first##*exit code }; fi
    tail -n 3 "$LOGS/rank_00000.log" 2>/dev/null | sed 's/^/rank 0: /' >&2 || true
    if ((status == 2)); then exit 2; fi
    newest=$(cat "$LOGS/newest_checkpoint" 2>/dev/null || true) # the checkpoint may be in an object store
    if [[ -f $LOGS/restarts ]]; then read -r tried before <"$LOGS/restarts"; fi
    if [[ ${newest:-none} != "$before" ]]; then tried=0; fi # it got on since the last failure
    if ((tried >= MAX_RESTARTS)); then
        say "ended with status $status, $((tried + 1)) times since ${newest:-the start}; not started again"
        rm -f "$LOGS/restarts"
        exit "$status"
    fi
    echo "$((tried + 1)) ${newest:-none}" >"$LOGS/restarts"
    if [[ -n $asked ]] || ((status == 75)); then requeue "stopped on request${asked:+ ($asked)} at ${newest:-no checkpoint}"; fi
    node=${first#srun: error: } node=${node%%:*}
    # Not to blame: several nodes at once, and tasks that somebody ended.
    if [[ $node == *"["* || $first == *Terminated* ]]; then node=; fi
    if [[ -n $node ]]; then echo "$node" >>"$LOGS/failed_nodes"; fi
    requeue "failed with status $status${node:+ on $node}, restart $((tried + 1)) of $MAX_RESTARTS without a new checkpoint"
}

# Puts the job back into the queue, without the nodes that keep failing, and ends it.
requeue() {
    local excluded=
    if [[ -f $LOGS/failed_nodes ]]; then
        excluded=$(sort "$LOGS/failed_nodes" | uniq -c | awk -v n="$NODE_FAILURES" '$1 >= n { print $2 }' | paste -sd,)
    fi
    say "requeued: $1${excluded:+; without $excluded}"
    trap '' TERM INT USR1
    # After scontrol requeue by somebody else, and after preemption, the job is in the queue already.
    if [[ $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]] && ! scontrol requeue "$SLURM_JOB_ID"; then
        say "the cluster does not requeue this job: submit it again"
        exit 75
    fi
    if [[ -n $excluded ]]; then
        scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$excluded" || say "$excluded could not be excluded"
    fi
    exit 75
}
