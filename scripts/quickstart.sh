#!/usr/bin/env bash
# Trains, evaluates and samples a small language model on Python's standard library: about three minutes on two cores.
#
#   bash scripts/quickstart.sh [--section.key value ...]        (arguments go to `train`)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

output=runs/quickstart
arguments=("$@")
for ((i = 0; i < ${#arguments[@]}; i++)); do
    case ${arguments[i]} in
        --run.output_dir) output=${arguments[i + 1]:-} ;;
        --run.output_dir=*) output=${arguments[i]#*=} ;;
    esac
done

.venv/bin/train-loop train --config configs/quickstart.yaml "$@"

echo
echo "A completed def (temperature 0.2, top-k 50, top-p 0.95, repetition penalty 1.1):"
echo
.venv/bin/train-loop sample --model "$output/model" --temperature 0.2 --repetition_penalty 1.1 --max_new_tokens 70 \
    --prompt $'    def __init__(self'
echo
echo "More: .venv/bin/train-loop sample --model $output/model --prompt 'import '"
