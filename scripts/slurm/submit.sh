#!/usr/bin/env bash
# Two jobs: the preparation, and the training that begins when it has succeeded. From the root of the repository:
#
#   bash scripts/slurm/submit.sh scripts/slurm/many_nodes.sh --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#
# SBATCH_OPTIONS go to both jobs, say SBATCH_OPTIONS="--partition=gpu --account=project". Prints the numbers of both.
set -euo pipefail

training=${1:?the sbatch file of the training, then what train gets}
shift
read -r -a options <<<"${SBATCH_OPTIONS:-}"
prepare=$(sbatch --parsable "${options[@]}" scripts/slurm/prepare.sh "$@")
# afterok: with kill-on-invalid-dep, a preparation that fails takes the training out of the queue.
train=$(sbatch --parsable --dependency="afterok:$prepare" --kill-on-invalid-dep=yes "${options[@]}" "$training" "$@")
echo "preparation: job $prepare; training: job $train, when that is done"
