#!/bin/bash
# A job under FSDP2 on several nodes that survives its time limit and preemption: it saves a checkpoint, is queued again,
# and resumes.
#
#   sbatch configs/slurm.sh --config configs/llama_8b_fsdp2.yaml --output_dir=runs/llama-8b
#
# Slurm sends USR1 to all processes 10 minutes before the time limit, and TERM at a preemption. They save a checkpoint after
# the current step and end with code 143. Only then the job is queued again. No launcher stands between Slurm and the
# processes: torchrun would kill them 30 seconds after a signal. The options are those of train_rm.py; output_dir must be on
# a file system that all nodes share.
#SBATCH --job-name=reward-model
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}" WORLD_SIZE="$SLURM_NTASKS"
# the variables that `accelerate launch` sets for configs/accelerate/multi_node_fsdp2.yaml
export ACCELERATE_USE_FSDP="${ACCELERATE_USE_FSDP:-true}" FSDP_VERSION=2 FSDP_CPU_RAM_EFFICIENT_LOADING=true
export FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP FSDP_RESHARD_AFTER_FORWARD=true

trap : TERM USR1 # which may reach this script too: it waits for the processes
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python train_rm.py "$@"' train_rm \
    "$@" --resume_from_checkpoint=latest
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
