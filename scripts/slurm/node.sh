#!/usr/bin/env bash
# One node's share of a job: it starts the launcher and passes signals on to the training. srun runs it on each node.
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The address that SLURM itself uses for the first node.
head=$(scontrol --oneliner show node "${nodes[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
port=$((20000 + SLURM_JOB_ID % 20000))              # jobs that share a node get different ports
# One process for each GPU of the node. On CPUs, name a number: PROCESSES_PER_NODE=4 ACCELERATE_USE_CPU=true sbatch ...
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

# A roll call that names every node that does not report within this many seconds.
if [ "${#nodes[@]}" -gt 1 ]; then
    python -m train_loop.distributed.host_check --port "$port" --number "$SLURM_NODEID" --seconds "${PATIENCE:-50}" \
        "$head" "${nodes[@]:1}"
fi

launch=(accelerate launch --mixed_precision no --dynamo_backend no)
if [ $((${#nodes[@]} * processes)) -gt 1 ]; then
    # c10d: the launchers find each other again if one of them has to restart its processes. Each time, the processes
    # get a new key-value store, without the addresses of processes that are gone.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    launch+=(--multi_gpu --num_machines "${#nodes[@]}" --num_processes $((${#nodes[@]} * processes))
        --machine_rank "$SLURM_NODEID" --main_process_ip "$head" --main_process_port "$port"
        --rdzv_backend c10d --rdzv_conf "join_timeout=${PATIENCE:-50}"
        --max_restarts "${MAX_RESTARTS:-2}")        # how many restarts before the job goes back into the queue
else
    launch+=(--num_processes 1)
fi
# For FSDP2: add launch+=(--config_file configs/accelerate/fsdp2.yaml), and leave out --multi_gpu.

trap '' USR1                                        # the signal is for the training and must not end the launcher
"${launch[@]}" -m train_loop train "$@" &
launcher=$!
trap 'pkill -USR1 -P "$launcher" -f "train_loop train" || true' USR1
trap ':' TERM                                       # SLURM also signals the launcher, which stops the training
code=0
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" && code=0 || code=$?
done
exit "$code"
