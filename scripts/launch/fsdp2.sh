#!/usr/bin/env bash
# One machine with several GPUs that share weights, gradients and moments (FSDP2), for models too large for one GPU:
#
#   bash scripts/launch/fsdp2.sh --config configs/eli5_distilgpt2.yaml --run.mixed_precision bf16 [--section.key value ...]
#
# On several machines, run.output_dir has to be on a disk that all of them share, because each process writes its part
# of a checkpoint there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH=$PWD/.venv/bin:$PATH                                   # or activate your own environment

processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}   # one for each GPU
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                # threads per process, for what runs on the CPU

exec accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes "$processes" \
    --main_process_port "${PORT:-29500}" \
    --max_restarts "${MAX_RESTARTS:-0}" \
    -m train_loop train "$@"
