#!/usr/bin/env bash
# A run on the GPUs of one node, from the root of the repository:
#
#   sbatch scripts/slurm/one_node.sh --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#
# Everything else is as in many_nodes.sh, which explains more.
#
#SBATCH --job-name=train_loop
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1         # one launcher; it starts a process for each GPU
#SBATCH --gres=gpu:8                # use --gres=none for CPUs
#SBATCH --cpus-per-task=32          # for all processes together
#SBATCH --time=24:00:00             # for one turn
#SBATCH --signal=B:USR1@300         # seconds before the end: enough for a step and a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append          # one log for all turns
#SBATCH --output=%x-%j.out

source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/scripts/slurm/job.sh"
train_in_queue "$@"
