# shellcheck shell=bash
# shellcheck disable=SC2034  # PRESET, STATUS and RAY_ADDRESS are for the scripts that source this one
# What the batch scripts share. A script sources it in the directory of the submission and calls run_stage DEFAULT_PRESET "$@",
# or what that is made of, in this order:
#   read_flags DEFAULT_PRESET "$@";  check_nodes;  start_ray;  train or another run_step;  finish STATUS
# Statuses: 0 done; 2 a mistake of the user's, not tried again unless the job had been working; 75 stopped on request;
# anything else a failure.
if [[ -z ${SLURM_JOB_ID:-} || " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p}' "$0"
    if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then exit 0; fi
    echo "error: this is a batch script; submit it: sbatch $0 $*" >&2
    exit 2
fi
# shellcheck source=launch/env.sh
source launch/env.sh

# What a launcher leaves in the environment of sbatch would reach every rank, and each would take itself for that one.
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR

asked=     # what asked the job to stop
step_pid=  # of the srun that does the work
ray_pids=() # of the sruns that hold Ray; the head's first
# shellcheck disable=SC2206  # SRUN_FLAGS is a list of words
SRUN=(srun --overlap $SRUN_FLAGS)
# The controller's name of this job alone: the number of one task of an array, the last one, means the whole array to it.
JOB=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
ERRORS=$(mktemp) # what srun says of the ranks of this start
trap 'rm -f "$ERRORS"' EXIT

say() { echo "$(date +%T) $*"; }

# Runs a client command of Slurm's, which may wait for its controller for long.
ask() { timeout 180 "$@"; }

die() {
    echo "error: $*" >&2
    refused 2
}

# Ends a job that cannot begin, with the status of what was tried. A mistake of the user's ends it for good, but for a later
# start of a job that has worked: a node may be to blame. Any other failure is tried again.
refused() {
    if (($1 != 2 || ${SLURM_RESTART_COUNT:-0} > 0)); then finish "$1"; fi
    exit 2
}

# What has been reached and will not be lost; a start that changes it made progress.
progress() { cat "$LOGS/newest_checkpoint" 2>/dev/null || true; } # the checkpoint may be in an object store

# Trains a stage, from the flags of its script to the end of the job.
run_stage() {
    read_flags "$@"
    check_nodes
    check_flags
    if needs_ray; then
        start_ray
        FLAGS+=(--teachers.ray-address "$RAY_ADDRESS")
    fi
    train
    finish "$STATUS"
}

# Sets PRESET, FLAGS, OUT and DEVICE. In a job array, {task} in a flag stands for the task's number: --seed {task} --out runs/{task}
read_flags() {
    PRESET=$1 FLAGS=()
    shift
    if (($#)) && [[ $1 != --* ]]; then
        PRESET=$1
        shift
    fi
    OUT=runs/$PRESET DEVICE=auto
    local word previous=
    for word in "$@"; do
        word=${word//\{task\}/${SLURM_ARRAY_TASK_ID:-0}}
        if [[ $previous == --out ]]; then OUT=$word; fi
        if [[ $word == --out=* ]]; then OUT=${word#--out=}; fi
        if [[ $previous == --device ]]; then DEVICE=$word; fi
        if [[ $word == --device=* ]]; then DEVICE=${word#--device=}; fi
        previous=$word
        # What was asked of the first start would begin a job anew each time that it is requeued.
        if [[ $word == --begin-anew ]] && ((${SLURM_RESTART_COUNT:-0} > 0)); then continue; fi
        FLAGS+=("$word")
    done
    OUT=${OUT/#\~\//$HOME/}
    FLAGS+=(--out "$OUT")
    LOGS=$OUT/logs
    TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
    NODES=$SLURM_JOB_NUM_NODES
    WORLD=$((NODES * TASKS_PER_NODE))
    if [[ -n ${SLURM_NTASKS:-} ]] && ((SLURM_NTASKS != WORLD)); then
        die "sbatch was given $SLURM_NTASKS tasks, and $NODES nodes of $TASKS_PER_NODE are $WORLD; pass --ntasks-per-node, not --ntasks"
    fi
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    if ((gpus > 0 && TASKS_PER_NODE > gpus)); then
        die "$TASKS_PER_NODE tasks a node share $gpus GPUs; pass as many of the one (--ntasks-per-node) as of the other"
    fi
    unset SLURM_NTASKS_PER_NODE # or every step below would have to obey it
    AT_START=$(progress)
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
        bash launch/check_node.sh "$PYTHON" "$OUT" "$DEVICE" 2>"$ERRORS") || {
        local status=$?
        cat "$ERRORS" >&2
        refused "$status"
    }
    after=$(date +%s)
    found=$(sort --version-sort <<<"$found")
    mapfile -t ORDER < <(awk '{ print $2 }' <<<"$found")
    HEAD=${ORDER[0]} HEAD_ADDRESS=$(awk '{ print $3; exit }' <<<"$found")
    HOSTS=$LOGS/hosts.$SLURM_JOB_ID
    for name in "${ORDER[@]}"; do
        for ((task = 0; task < TASKS_PER_NODE; task++)); do echo "$name"; done
    done >"$HOSTS" || {
        say "$HOSTS cannot be written"
        finish 1
    }
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
    resolved=$(RANK=0 WORLD_SIZE=$WORLD MASTER_ADDR=$HEAD_ADDRESS MASTER_PORT=$MASTER_PORT "${SRUN[@]}" \
        --nodes=1 --ntasks=1 --nodelist="$HEAD" "$PYTHON" -m cogvit.train "$PRESET" "${FLAGS[@]}" --dry-run) || refused $?
    read -r TP PP TEACHERS LOADING < <("${SRUN[@]}" --nodes=1 --ntasks=1 --nodelist="$HEAD" "$PYTHON" -c '
import json, sys
run = json.loads(sys.argv[1])
teachers = run["teachers"]["source"] if run["objective"] == "distill" else "none"
teachers = "rollout-actors" if run["objective"] == "policy" and run["rl"]["actors"] else teachers
print(run["parallel"]["tp"], run["parallel"]["pp"], teachers, run["data"]["loading"])
' "$resolved") || finish 1
    ((TASKS_PER_NODE % TP == 0)) ||
        die "--parallel.tp $TP does not divide $TASKS_PER_NODE tasks per node: tensor ranks would sit on two nodes"
    say "$PRESET at tp=$TP pp=$PP dp=$((WORLD / TP / PP)), teachers: $TEACHERS, loading: $LOADING"
}

# Whether the run that check_flags looked at talks to Ray.
needs_ray() { [[ $TEACHERS == *online* || $TEACHERS == rollout-actors || $LOADING == server ]]; }

# Starts a Ray cluster on the job's nodes, with a token of its own, and waits until all are in it; sets RAY_ADDRESS.
start_ray() {
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH
    RAY_AUTH_TOKEN_PATH=$(realpath "$LOGS")/.ray-token.$SLURM_JOB_ID
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH") || {
        say "$RAY_AUTH_TOKEN_PATH cannot be written"
        finish 1
    }
    RAY_ADDRESS=$HEAD_ADDRESS:$RAY_PORT
    export RAY_FILES=$RAY_TMPDIR/cogvit-ray-$SLURM_JOB_ID RAY_PORT RAY_ADDRESS RAY_CPUS RAY_GPUS RAY_STORE_BYTES
    export RAY_BEHIND_GPUS=$TASKS_PER_NODE
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
    if ((TP > 1)) && [[ -n $TP_CONNECTIONS ]]; then
        export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-$TP_CONNECTIONS}
    fi
    # Since Slurm 22.05 srun does not take the job's --cpus-per-task over: a bound rank would have one CPU.
    SLURM_HOSTFILE=$HOSTS run_step --ntasks="$WORLD" --distribution=arbitrary --kill-on-bad-exit=1 \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        --output="${LOGS//%/%%}/rank_%5t.log" --open-mode=append "$PYTHON" -m cogvit.train "$PRESET" "${FLAGS[@]}"
}

# Runs the step that does the job's work and waits for its end; sets STATUS. Ray's end asks the step to save and stop.
run_step() {
    local head=${ray_pids[0]:-} shown
    "${SRUN[@]}" "$@" 2>"$ERRORS" &
    step_pid=$!
    tail --lines=+1 --follow --sleep-interval=0.5 --pid="$step_pid" "$ERRORS" >&2 &
    shown=$!
    if [[ -n $asked ]]; then ask_to_stop "$asked"; fi # it came before there was a step to tell
    while kill -0 "$step_pid" 2>/dev/null; do
        if [[ -n $head ]] && ! kill -0 "$head" 2>/dev/null; then
            say "Ray's head is gone; the ranks are asked to save"
            head= # a second signal would cut the save short
            kill -USR1 "$step_pid" 2>/dev/null || true
        fi
        sleep 0.5 &
        wait "$!" || true # a signal ends the wait, not the sleep
    done
    STATUS=0
    wait "$step_pid" || STATUS=$?
    wait "$shown" || true
    stop_ray
}

# Ends Ray's steps now; at the job's end they would be sent SIGTERM, which they block, and waited for.
stop_ray() {
    ((${#ray_pids[@]} > 0)) || return 0
    kill -QUIT "${ray_pids[@]}" 2>/dev/null || true
    wait "${ray_pids[@]}" 2>/dev/null || true
    ray_pids=()
    # shellcheck disable=SC2016  # for the node's own shell
    timeout 20 "${SRUN[@]}" --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        bash -c 'rm -rf "$RAY_FILES-$SLURMD_NODENAME"' 2>/dev/null || true
}

# Ends the job with what its status asks for: done, refused, or another start.
finish() {
    local status=$1 now before='' tried=0 rank=0 node='' first owner stopped='' record=$LOGS/restarts.$SLURM_JOB_ID
    rm -f "${RAY_AUTH_TOKEN_PATH:-}"
    if ((status == 0)); then
        say "done"
        exit 0
    fi
    # srun names what failed, the first one first; its status is the highest, so that of tasks which others took down.
    first=$(grep -m 1 '^srun: error: \(Node failure on \|[^ ]*: tasks\? [0-9,-]*: \)' "$ERRORS" || true)
    if [[ $first =~ ^srun:\ error:\ ([^ ]*):\ tasks?\ ([0-9]+) ]]; then node=${BASH_REMATCH[1]} rank=${BASH_REMATCH[2]}; fi
    if [[ $first =~ Node\ failure\ on\ ([^ ]*) ]]; then node=${BASH_REMATCH[1]}; fi
    if [[ $first == *"exit code "* ]]; then status=${first##*exit code }; fi
    # A run that is another job's: what it saves is not this job's progress.
    owner=$(sed -n 's/.*"job": "\([0-9]*\)".*/\1/p' "$OUT/lock.json" 2>/dev/null) || true
    if ((status == 2)) && [[ -n $owner && $owner != "$SLURM_JOB_ID" ]]; then
        say "$OUT is in use by job $owner"
        exit 2
    fi
    if [[ -n $step_pid ]]; then # else no rank has said anything in this start
        tail -n 3 "$LOGS/rank_$(printf %05d "$rank").log" 2>/dev/null | sed "s/^/rank $rank: /" >&2 || true
    fi
    now=$(progress)
    if ((status == 2 && ${SLURM_RESTART_COUNT:-0} == 0)) && [[ -z $asked && $now == "$AT_START" ]]; then exit 2; fi
    if [[ -n $asked ]] || ((status == 75)); then stopped="stopped on request${asked:+ ($asked)} at ${now:-no checkpoint}"; fi
    if [[ -f $record ]]; then read -r tried before <"$record" || true; fi
    if [[ $now != "$before" ]]; then tried=0; fi # it got on since the last failure
    if [[ -z $stopped || $now == "$before" ]]; then tried=$((tried + 1)); fi
    if ((tried > MAX_RESTARTS)); then
        say "ended with status $status, $tried times since ${now:-the start}; not started again"
        exit "$status"
    fi
    { mkdir -p "$LOGS" && echo "$tried $now" >"$record"; } || { say "restarts cannot be counted; not started again" && exit "$status"; }
    if [[ -n $stopped ]]; then requeue "$stopped"; fi
    # Not to blame: several nodes at once, tasks that somebody ended, and what the trainer itself refuses.
    if [[ $node == *"["* || $first == *Terminated* ]] || [[ $status == 2 && -n $step_pid ]]; then node=; fi
    if [[ -n $node ]]; then echo "$(date +%s) $node" >>"$LOGS/failed_nodes.$SLURM_JOB_ID"; fi
    requeue "failed with status $status${node:+ on $node}, restart $tried of $MAX_RESTARTS without a new checkpoint"
}

# Prints the nodes that keep failing, joined by commas: nothing while the job could not do without them.
nodes_to_exclude() {
    local record=$LOGS/failed_nodes.$SLURM_JOB_ID failing told left since=$(($(date +%s) - NODE_FAILURES_HOURS * 3600))
    [[ -f $record ]] || return 0
    failing=$(awk -v since="$since" '$1 >= since { print $2 }' "$record" | sort | uniq -c |
        awk -v n="$NODE_FAILURES" '$1 >= n { print $2 }')
    [[ -n $failing ]] || return 0
    # Those that sbatch was told to exclude would be forgotten.
    told=$(ask scontrol --oneliner show job "$JOB" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p') || true
    [[ -n $told ]] || return 0 # the controller does not answer
    if [[ $told != "(null)" ]]; then failing=$(sort -u <<<"$failing"$'\n'"$(scontrol show hostnames "$told")"); fi
    # A job with too few nodes left, of those that are up, would wait for good.
    left=$(ask sinfo --noheader --Node --partition "$SLURM_JOB_PARTITION" --format "%N %t" |
        awk '$2 !~ /^(down|drain|drng|fail|maint|unk)|\*$/ { print $1 }' | sort -u | grep -cvxF "$failing" || true)
    failing=$(paste -sd, <<<"$failing")
    if ((left >= NODES)); then
        echo "$failing"
    else
        say "$failing cannot be excluded: the job needs $NODES nodes, and $left would be left" >&2
    fi
}

# Puts the job back into the queue, without the nodes that keep failing, and ends it.
requeue() {
    local excluded state tries
    excluded=$(nodes_to_exclude)
    say "requeued: $1${excluded:+; without $excluded}"
    trap '' TERM INT USR1 # for the commands below too; Slurm ends what is left of a job that it requeues
    for ((tries = 1; ; tries++)); do
        state=$(squeue --noheader --jobs "$JOB" --format "%T %r") || state=unknown
        case $state in
            # At its time limit a job is not in the queue again; after preemption, and scontrol requeue by others, it is.
            RUNNING* | unknown | "COMPLETING TimeLimit") if scontrol requeue "$JOB"; then break; fi ;;
            *) break ;;
        esac
        if ((tries == REQUEUE_TRIES)); then
            say "the cluster does not requeue this job: submit it again"
            exit 75
        fi
        sleep 10 # a controller that is restarted is back in a minute
    done
    if [[ -n $excluded ]]; then
        scontrol update "JobId=$JOB" "ExcNodeList=$excluded" || say "$excluded could not be excluded"
    fi
    exit 75
}
