#!/usr/bin/env bash
# Two or more machines, started by hand. Run this on the first machine, then on the second, and so on:
#
#   HOSTS="10.0.0.1 10.0.0.2" bash scripts/launch/machines.sh 0 --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#   HOSTS="10.0.0.1 10.0.0.2" bash scripts/launch/machines.sh 1 --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#
# All machines need the same versions of everything, and the others must be able to reach PORT on the first machine.
# They don't have to share a disk: each one prepares its own data, and the first one has the run's folder. If a machine
# is lost, the others stop and say which one. The same commands, on all machines, resume from the newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH=$PWD/.venv/bin:$PATH                                   # or activate your own environment

read -r -a hosts <<<"${HOSTS:?addresses of all machines, the first one first: HOSTS=\"10.0.0.1 10.0.0.2\"}"
machine=${1:?give the number of this machine, from 0, then the arguments of train}
shift
processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}   # on each machine: one for each GPU
port=${PORT:-29500}                                         # any free port on the first machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                # threads per process, for what runs on the CPU
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0    # the network to use, if a machine has several

# A roll call that names missing machines. Without it, the launcher would wait ten minutes and not say who is missing.
python -m train_loop.distributed.host_check --port "$port" --number "$machine" --seconds "${PATIENCE:-50}" "${hosts[@]}"

exec accelerate launch --config_file configs/accelerate/machines.yaml \
    --num_machines "${#hosts[@]}" --num_processes $((${#hosts[@]} * processes)) --machine_rank "$machine" \
    --main_process_ip "${hosts[0]}" --main_process_port "$port" \
    --rdzv_conf timeout=60 \
    -m train_loop train "$@"
# timeout: seconds until the launcher itself gives up on a machine that answered the roll call and then failed to start.
