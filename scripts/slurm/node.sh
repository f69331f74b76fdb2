#!/usr/bin/env bash
# One node's share of a job: its launcher, and the signals meant for the training. Started by srun, once on each node.
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Where SLURM itself reaches the first node.
head=$(scontrol --oneliner show node "${nodes[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
port=$((20000 + SLURM_JOB_ID % 20000))              # jobs that share a node get different ones
# One process for each GPU of the node; on CPUs, say how many: PROCESSES_PER_NODE=4 ACCELERATE_USE_CPU=true sbatch ...
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

# Who is there? Whoever does not come within this many seconds is named.
if [ "${#nodes[@]}" -gt 1 ]; then
    python -m train_loop.distributed.host_check --port "$port" --number "$SLURM_NODEID" --seconds "${PATIENCE:-50}" \
        "$head" "${nodes[@]:1}"
fi

launch=(accelerate launch --mixed_precision no --dynamo_backend no)
if [ $((${#nodes[@]} * processes)) -gt 1 ]; then
    # c10d: the launchers find each other again when one of them has to restart its processes. Each time these get a
    # key-value store of their own, where nobody finds the addresses of those who are gone.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    launch+=(--multi_gpu --num_machines "${#nodes[@]}" --num_processes $((${#nodes[@]} * processes))
        --machine_rank "$SLURM_NODEID" --main_process_ip "$head" --main_process_port "$port"
        --rdzv_backend c10d --rdzv_conf "join_timeout=${PATIENCE:-50}"
        --max_restarts "${MAX_RESTARTS:-2}")        # how often before the job goes back into the queue
else
    launch+=(--num_processes 1)
fi
# For FSDP2: launch+=(--config_file configs/accelerate/fsdp2.yaml), and leave --multi_gpu out.

trap '' USR1                                        # the launcher is not to die of it: it is for the training
"${launch[@]}" -m train_loop train "$@" &
launcher=$!
trap 'pkill -USR1 -P "$launcher" -f "train_loop train" || true' USR1
trap ':' TERM                                       # SLURM tells the launcher as well, which stops the training
code=0
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" && code=0 || code=$?
done
exit "$code"
