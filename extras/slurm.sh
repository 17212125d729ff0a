#!/usr/bin/env bash
# One stage on SLURM, on one node or several. A run that reaches its time limit saves, goes back into
# the queue and goes on there with the same command.
#
#     sbatch --nodes=2 extras/slurm.sh pretrain.py --model base --data /imagenet --out runs/base
#
# OUT has to be a folder that all nodes see. Account, partition and time limit are your cluster's:
# give them to sbatch, or write them below.
#SBATCH --job-name=beit2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180          # three minutes before the limit, this script gets SIGUSR1
set -uo pipefail

processes=${SLURM_GPUS_ON_NODE:-1}
nodes=${SLURM_NNODES:-1}
first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)

stopped=no
stop() {
    stopped=yes
    kill -TERM "$child"              # torchrun hands it on; each process ends its step and saves
}
trap stop USR1

srun torchrun --nnodes="$nodes" --nproc_per_node="$processes" --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d --rdzv_endpoint="$first:29500" "$@" &
child=$!
wait "$child"
code=$?
if [ "$stopped" = yes ]; then
    wait "$child"                    # the first wait ended with the signal, not with the run
    code=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
