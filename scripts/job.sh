# Sourced by the experiment scripts, from the repository's root: submit queues one of them, launch runs its program.
source scripts/environment.sh

fail() { echo "error: $*" >&2; exit 2; }

need_python() { # PYTHON: the interpreter that the caller named, or that of this project's environment
    if [ -n "${PYTHON:-}" ]; then return; fi
    make_environment .venv requirements.txt
    PYTHON=$PWD/.venv/bin/python
}

submit() { # NAME ARGUMENTS...: queues scripts/NAME.sh with the caller's partition, account, gpus, cpus and time_limit
    local name=$1 options
    shift
    command -v sbatch > /dev/null || fail "--submit: there is no sbatch here; without --submit it runs on this machine"
    need_python # here, where there is a network
    mkdir -p logs # SLURM does not make the directory of --output: without it the job fails and says nothing
    options=(--job-name "$name" --output "logs/%x-%j.out" --nodes 1 --ntasks 1)
    options+=(--cpus-per-task "${cpus:?}" --time "${time_limit:?}")
    [ "${gpus:?}" = 0 ] || options+=(--gpus-per-node "$gpus")
    [ -z "$partition" ] || options+=(--partition "$partition")
    [ -z "$account" ] || options+=(--account "$account")
    sbatch "${options[@]}" "scripts/$name.sh" "$@"
}

launch() { # PROGRAM ARGUMENTS...: under torchrun on all GPUs; without one, in PROCESSES processes (1)
    local processes threads command
    need_python
    processes=${PROCESSES:-$("$PYTHON" -c "import torch; print(max(1, torch.cuda.device_count()))")}
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES: $processes: must be a whole number, at least 1"
    threads=$((${SLURM_CPUS_ON_NODE:-$(nproc)} / processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))} TOKENIZERS_PARALLELISM=false
    command=("$PYTHON")
    [ "$processes" = 1 ] || command+=(-m torch.distributed.run --standalone --nproc_per_node "$processes")
    # A job that was queued again goes on, even if its first start was told to forget what was there.
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- "$@" fresh=false
    run_to_the_end "$processes" "${command[@]}" "$@"
}

run_to_the_end() { # PROCESSES COMMAND...: signals are passed on; a job that one stopped is queued again
    local code
    workers=$1 child="" stopped="" watchdog=""
    shift
    trap stop TERM USR1 INT HUP
    set -m # a process group of its own for the command: Ctrl-C reaches this script alone, which passes it on once
    "$@" &
    child=$!
    set +m
    [ -z "$stopped" ] || stop
    while :; do
        interrupted="" code=0
        wait "$child" || code=$?
        [ -n "$interrupted" ] || break # else it was the signal that ended the wait
    done
    [ -z "$watchdog" ] || kill -- "-$watchdog" 2> /dev/null || true
    if [ -n "$stopped" ]; then
        echo "== stopped with exit code $code; the same command goes on from there"
        queue_again
    fi
    return "$code"
}

stop() {
    stopped=yes interrupted=yes
    [ -n "$child" ] || return 0
    if [ "$workers" = 1 ]; then
        kill -TERM "$child" || true
    else # torchrun itself would end with an error; it ends well when its workers do
        pkill -TERM -P "$child" || kill -TERM "$child" || true
    fi
    # A job has to be queued again before its time is over: what does not end is ended.
    if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "$watchdog" ]; then
        set -m
        { sleep "${PATIENCE:-90}" && kill -KILL -- "-$child"; } &
        watchdog=$!
        set +m
    fi
}

queue_again() {
    local state
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) || state=""
    case $state in
        *RUNNING* | "") scontrol requeue "$SLURM_JOB_ID" || echo "error: job $SLURM_JOB_ID was not queued again" >&2 ;;
        *) echo "== job $SLURM_JOB_ID is $state: not queued again" ;; # cancelled, or SLURM has queued it again
    esac
}
