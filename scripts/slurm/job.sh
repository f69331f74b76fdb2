# shellcheck shell=bash
# Sourced by the sbatch files in this folder: what a job does around its steps.
#
# A job trains until SLURM says that its time is nearly up (SIGUSR1, see --signal). Then it has the run write a
# checkpoint, and puts itself back into the queue, to resume from there. This goes on until the run is complete.

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1                # jobs are submitted from the root of the repository
PATH=$PWD/.venv/bin:$PATH                            # or activate your own environment, on a disk that all nodes share
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}         # threads per process, for what runs on the CPU

# The run's folder, from --run.output_dir or the configuration's name, as train-loop itself determines it.
output_of() {
    local output='' config='' name
    while [ $# -gt 0 ]; do
        case $1 in
            --run.output_dir=*) output=${1#*=} ;;
            --config=*) config=${1#*=} ;;
            --run.output_dir) output=${2:-} ;;
            --config) config=${2:-} ;;
        esac
        shift
    done
    if [ -z "$output" ] && [ -n "$config" ]; then
        output=$(sed -n 's/^  output_dir: *\([^ #]*\).*/\1/p' "$config" | head -n 1)
    fi
    name=$(basename "${config:-train}")
    echo "${output:-runs/${name%.*}}"
}

# The state in a run's status.json: running, stopped, failed or complete.
state_of() {
    sed -n 's/.*"state": "\([a-z]*\)".*/\1/p' "$1/status.json" 2>/dev/null
}

# The newest checkpoint, to see whether a job has made progress.
newest_of() {
    find "$1/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1
}

# train_in_queue ARGUMENTS: runs one launcher on each node of the job, and then decides what happens to the job.
train_in_queue() {
    local output before step code asked='' state
    output=$(output_of "$@")
    before=$(newest_of "$output")

    # --kill-on-bad-exit=0: if one node fails, the others should report it and end by themselves.
    srun --kill-on-bad-exit=0 --label bash scripts/slurm/node.sh "$@" &
    step=$!
    trap 'asked=yes' USR1
    code=''
    while [ -z "$code" ]; do
        if [ -n "$asked" ] && kill -USR1 "$step" 2>/dev/null; then
            sleep 5 &                                # srun passes it on; repeat it, in case nodes were starting
            wait $!
            continue
        fi
        wait "$step"                                 # ends early when the signal comes
        state=$?
        kill -0 "$step" 2>/dev/null || code=$state
    done

    state=$(state_of "$output")
    echo "job ${SLURM_JOB_ID}: the run in $output is ${state:-not started yet} (srun: exit code $code)"
    if [ "$state" = complete ] && [ "$code" -eq 0 ]; then
        return 0
    fi
    if [ -n "$asked" ] && [ "$state" = stopped ]; then
        requeue "the time is nearly up"
    elif [ "$(newest_of "$output")" != "$before" ]; then
        requeue "something failed, but there is a newer checkpoint than before"
    fi
    return 1                                         # no progress: trying again would not help
}

requeue() {
    echo "job ${SLURM_JOB_ID}: $1; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60                                         # SLURM ends this script
}
