#!/usr/bin/env bash
# Two machines (or more) by hand. On the first of them, then on the second, and so on:
#
#   HOSTS="10.0.0.1 10.0.0.2" bash scripts/launch/machines.sh 0 --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#   HOSTS="10.0.0.1 10.0.0.2" bash scripts/launch/machines.sh 1 --config configs/eli5_distilgpt2.yaml [--section.key value ...]
#
# They need the same version of everything, and the first machine's PORT open to the others, who needn't share a disk:
# each prepares its data by itself, and the first has the run's folder. When one is lost the others stop and say which;
# the same commands, on all of them, go on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH=$PWD/.venv/bin:$PATH                                   # or activate an environment of your own

read -r -a hosts <<<"${HOSTS:?addresses of all machines, the first one first: HOSTS=\"10.0.0.1 10.0.0.2\"}"
machine=${1:?number of this machine, from 0, then what train gets}
shift
processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}   # on each machine: one for each GPU
port=${PORT:-29500}                                         # any free one of the first machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                # threads of a process, for what is left to the CPU
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0    # the network to use, where a machine has several

# Who is there? Names whoever does not come; without it, the launcher would wait ten minutes and name nobody.
python -m train_loop.distributed.host_check --port "$port" --number "$machine" --seconds "${PATIENCE:-50}" "${hosts[@]}"

exec accelerate launch --config_file configs/accelerate/machines.yaml \
    --num_machines "${#hosts[@]}" --num_processes $((${#hosts[@]} * processes)) --machine_rank "$machine" \
    --main_process_ip "${hosts[0]}" --main_process_port "$port" \
    --rdzv_conf timeout=60 \
    -m train_loop train "$@"
# timeout: seconds until the launcher itself gives up on one that answered and then failed to start.
