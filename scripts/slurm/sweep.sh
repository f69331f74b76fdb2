#!/usr/bin/env bash
# A sweep: the same run with different settings, each in its own job of an array. From the root of the repository:
#
#   sbatch scripts/slurm/sweep.sh --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#
# Each job goes back into the queue by itself until its run is complete.
#
#SBATCH --job-name=sweep
#SBATCH --array=0-3%2               # one for each value below; at most two at a time
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1                # use --gres=none for CPUs
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00             # for one turn
#SBATCH --signal=B:USR1@120         # seconds before the end: enough for a step and a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.out

source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/scripts/slurm/job.sh"

read -r -a values <<<"${VALUES:-1e-5 2e-5 5e-5 1e-4}"   # one for each job of the array
key=${KEY:-optimizer.learning_rate}
value=${values[$SLURM_ARRAY_TASK_ID]}
train_in_queue "$@" "--$key" "$value" --run.output_dir "${SWEEP:-runs/sweep}/$key-$value"
