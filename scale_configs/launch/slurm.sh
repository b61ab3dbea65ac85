#!/bin/bash
# Several machines under Slurm, on a folder that all of them see:
#
#     sbatch scale_configs/launch/slurm.sh llama-3-8b --train.run-dir runs/llama-3-8b --data.corpus hf:...
#
# What follows the name of the script is what follows `nanomai train`. The job saves and queues itself again before its
# time is up, and goes on from the newest checkpoint, as it does after a rank or a machine has failed.

#SBATCH --job-name=nanomai
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1          # one torchrun on each machine; it starts a rank for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300          # to this script, five minutes before the end
#SBATCH --requeue                    # Slurm itself starts it again after preemption or the loss of a machine
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

# The ranks have this long to end their step and to save (torch 2.13; earlier versions allow 30 seconds).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

# Every machine meets at the first one. A port of its own for each job: two may share a machine.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

# --max-restarts: a rank that dies or hangs ends all, and all begin again at the newest checkpoint.
# --tee 3 --log-dir: what a rank prints comes here, with its number, and into a file of its own.
srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=10 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --tee=3 --log-dir="logs/$SLURM_JOB_ID" \
    -m nanomai train "$@" --train.resume &
job=$!

# srun hands the signal on to every torchrun, and torchrun to every rank.
out_of_time=
trap 'out_of_time=1; kill -TERM "$job"' TERM
wait "$job"
status=$?
if [[ $out_of_time ]]; then
    wait "$job"  # the first `wait` ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
