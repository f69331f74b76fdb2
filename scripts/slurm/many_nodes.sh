#!/usr/bin/env bash
# A run on several nodes, from the root of the repository on a disk that all nodes share:
#
#   sbatch scripts/slurm/many_nodes.sh --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#
# Options for sbatch go before the script's name and override those below. The job goes back into the queue before its
# time is up, and after a node is lost, until the run is complete. `scancel` ends it for good. Then the same sbatch
# command resumes from the newest checkpoint.
#
#SBATCH --job-name=train_loop
#SBATCH --nodes=2                   # 1-2 also accepts one node if there are not two
#SBATCH --ntasks-per-node=1         # one launcher; it starts a process for each GPU
#SBATCH --gres=gpu:8                # GPUs per node; use --gres=none for CPUs
#SBATCH --cpus-per-task=32          # for all processes of a node together
#SBATCH --time=24:00:00             # for one turn; the queue may have a limit
#SBATCH --signal=B:USR1@300         # seconds before the end: enough for a step and a checkpoint
#SBATCH --requeue                   # also after a node has failed
#SBATCH --open-mode=append          # one log for all turns
#SBATCH --output=%x-%j.out
#
# #SBATCH --partition=gpu           # as your cluster needs it
# #SBATCH --account=project

source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/scripts/slurm/job.sh"
# export NCCL_SOCKET_IFNAME=ib0     # the network to use, if the nodes have several
train_in_queue "$@"
