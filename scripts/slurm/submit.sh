#!/usr/bin/env bash
# Submits two jobs: the preparation, and the training, which begins after it has succeeded. From the repository's root:
#
#   bash scripts/slurm/submit.sh scripts/slurm/many_nodes.sh --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#
# SBATCH_OPTIONS apply to both jobs, e.g. SBATCH_OPTIONS="--partition=gpu --account=project". Prints both job numbers.
set -euo pipefail

training=${1:?name the sbatch file of the training, then the arguments of train}
shift
read -r -a options <<<"${SBATCH_OPTIONS:-}"
prepare=$(sbatch --parsable "${options[@]}" scripts/slurm/prepare.sh "$@")
# afterok and kill-on-invalid-dep: if the preparation fails, the training leaves the queue.
train=$(sbatch --parsable --dependency="afterok:$prepare" --kill-on-invalid-dep=yes "${options[@]}" "$training" "$@")
echo "preparation: job $prepare; training: job $train, after that"
