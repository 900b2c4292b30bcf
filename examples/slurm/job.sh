# shellcheck shell=bash
# What the job scripts beside this file do after they have set their variables: start the ranks, pass on that they are
# to stop, and see when they have ended whether the job is to be started again. docs/slurm.md
#
# srun starts the ranks itself. torchrun would die of SIGUSR1, and its exit code is 1 whatever that of the ranks is.

say() {
    printf '%(%F %T)T job %s: %s\n' -1 "$SLURM_JOB_ID" "$*"
}

# The newest complete checkpoint: complete.json is what a save writes last. Looks no further, as the run itself checks
# all files when it goes on, and passes over damaged ones. Arguments are more conditions of find.
newest_checkpoint() {
    [[ -d $ATUM_RUN/checkpoints ]] || return 0
    find "$ATUM_RUN/checkpoints" -maxdepth 2 -path '*/step-????????/complete.json' "$@" -printf '%h\n' | sort | tail -n 1
}

# As a value of YAML, whatever is in it.
quoted() {
    printf "'%s'" "${1//\'/\'\'}"
}

# A command that fails while slurmctld does not answer.
patiently() {
    local attempt
    for attempt in 1 2 3 4 5 6; do
        "$@" && return
        [[ $attempt == 6 ]] || sleep "${ATUM_PATIENCE:-20}"
    done
    return 1
}

start_ranks() {
    # What Slurm has taken over from the shell of sbatch: limits too low for hundreds of ranks, and ranks of another run.
    ulimit -n "$(ulimit -Hn)" || true
    ulimit -l unlimited 2>/dev/null || true # EFA pins memory; tools/check_cluster.py looks at it
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
    # When a rank has ended, all others end within a minute and say why; srun waits for that.
    # Neighbouring ranks share a node, and on it a socket, as neighbouring GPUs do.
    local options=(
        --export=ALL --kill-on-bad-exit=0 --wait=120
        --distribution=block:block --cpu-bind=cores --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"
        --output="$ATUM_RUN/logs/rank-%t.log" --open-mode=append
    )
    if [[ $ATUM_IMAGE ]]; then
        options+=(
            --container-image="$ATUM_IMAGE" --container-mounts="$ATUM_MOUNTS" --container-workdir="$PWD"
            # Else values of the image would count more than those that are set here.
            --container-env="$(compgen -e | grep -E '^(ATUM|NCCL|FI|OFI_NCCL|TORCH|GLOO|OMP|MASTER|CUDA_DEVICE)_' | paste -sd,)"
        )
    fi
    if [[ -d /opt/sagemaker_cluster ]]; then # HyperPod: replaces a broken node and starts again
        options+=(--auto-resume=1)
    fi
    srun "${options[@]}" "$ATUM_PYTHON" pretrain_atum.py --config "$ATUM_CONFIG" "$@" \
        logging.root="$(quoted "$(dirname "$ATUM_RUN")")" logging.run="$(quoted "$(basename "$ATUM_RUN")")" &
    srun=$!
}

# Slurm sends this some minutes before the time limit (--signal), and to this script only.
usr1() {
    if [[ ! $asked ]]; then # a second signal would end the ranks at once
        asked=SIGUSR1
        say "SIGUSR1: the ranks save and stop"
        kill -USR1 "$srun" || true # srun passes it on
    fi
}

# Preemption, scancel, or the loss of a node. The ranks have it from Slurm as well.
term() {
    asked=SIGTERM
    say "SIGTERM: Slurm ends the job"
}

# Sets `code` to the exit code of srun: the highest of all ranks.
wait_for_ranks() {
    while kill -0 "$srun" 2>/dev/null; do
        wait "$srun" || true # ends also when this script has had a signal
    done
    code=0
    wait "$srun" || code=$?
}

end() {
    say "exit code $code: $*"
    exit "$code"
}

# Start the job again, or say why not.
decide() {
    local logs="$ATUM_RUN/logs/rank-*.log say" job state newest
    case $code in
    0) end "done, or stopped by $ATUM_RUN/stop" ;;
    2) end "not started again, as configuration, data or checkpoint are to be mended; $logs what" ;;
    3) end "not started again, as somebody must look at its numbers first; $logs what is wrong" ;;
    85) asked=${asked:-signal} ;;
    esac
    job=$(patiently scontrol show job --oneliner "$SLURM_JOB_ID") || end "not started again, as slurmctld does not answer"
    state=$(grep -o 'JobState=[A-Z_]*' <<<"$job" || true)
    if [[ $state != JobState=RUNNING ]]; then
        end "Slurm has ended the job (${state#*=}): it was cancelled, is at its time limit, or has lost a node"
    fi
    if [[ $job =~ PreemptTime=[0-9] ]]; then # some versions of Slurm tell only the ranks
        asked=preemption
    fi
    newest=$(newest_checkpoint) || true
    if [[ ! $newest ]]; then
        end "not started again, as there is no complete checkpoint; $logs what failed"
    fi
    if ! count_failures; then
        end "not started again, as $failures starts in a row failed and completed no checkpoint; $logs what failed"
    fi
    if ((restarts >= ATUM_RESTARTS)); then
        end "not started again, as this was restart $restarts of ATUM_RESTARTS=$ATUM_RESTARTS"
    fi
    say "exit code $code: restart $((restarts + 1)) of at most $ATUM_RESTARTS follows, from ${newest##*/}"
    patiently scontrol requeue "$SLURM_JOB_ID" || end "not started again, as slurmctld does not answer"
}

# Starts in a row that failed by themselves and completed no checkpoint: they may fail at the same place for ever.
count_failures() {
    failures=0
    if [[ ! $asked && ! $(newest_checkpoint -newer "$started") ]]; then
        failures=$(($(cat "$failed" 2>/dev/null || echo 0) + 1))
    fi
    echo "$failures" >"$failed"
    ((failures <= ATUM_RETRIES))
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
asked='' srun='' code=1
trap usr1 USR1
trap term TERM
restarts=${SLURM_RESTART_COUNT:-0}
if ((restarts > ATUM_RESTARTS)); then # started again by Slurm, as after the loss of a node
    end "not started, as this would be restart $restarts of ATUM_RESTARTS=$ATUM_RESTARTS"
fi
mkdir -p "$ATUM_RUN/logs"
started=$ATUM_RUN/logs/slurm-started failed=$ATUM_RUN/logs/slurm-failed
touch "$started"
((restarts)) || rm -f "$failed" # of an earlier job
say "start $restarts on $SLURM_JOB_NODELIST, run folder $ATUM_RUN"
start_ranks "$@"
wait_for_ranks
decide
