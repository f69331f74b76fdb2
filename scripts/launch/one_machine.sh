#!/usr/bin/env bash
# One machine with several GPUs, each of which holds the whole model (DDP):
#
#   bash scripts/launch/one_machine.sh --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#
# The same command resumes a run that was cut off. To try it without a GPU:
#   ACCELERATE_USE_CPU=true PROCESSES=2 bash scripts/launch/one_machine.sh --config configs/quickstart.yaml --batch.micro_batch_size 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH=$PWD/.venv/bin:$PATH                                   # or activate your own environment

processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}   # one for each GPU
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                # threads per process, for what runs on the CPU

exec accelerate launch --config_file configs/accelerate/gpus.yaml --num_processes "$processes" \
    --main_process_port "${PORT:-29500}" \
    --max_restarts "${MAX_RESTARTS:-0}" \
    -m train_loop train "$@"
# PORT: any free port; two runs on one machine need two different ones.
# MAX_RESTARTS: how often the launcher restarts all processes after one is lost; they resume from the newest checkpoint.
