#!/usr/bin/env bash
# Prepares the data in a separate job, so that no GPUs wait for it. submit.sh submits it before the training.
#
#   sbatch scripts/slurm/prepare.sh --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#
# The store is in data.cache_dir, or $TRAIN_LOOP_CACHE, or else ~/.cache/train_loop, on a disk that all nodes share.
#
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16          # the tokenizer uses all of them
#SBATCH --time=4:00:00
#SBATCH --output=%x-%j.out

source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/scripts/slurm/job.sh"
unset OMP_NUM_THREADS
train-loop prepare "$@"
