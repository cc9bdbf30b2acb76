#!/bin/bash
# A grid as a Slurm array job: each task is one run, stops with a checkpoint before its time limit, and is queued again.
#   mkdir -p runs/sweep && sbatch configs/sweep_slurm.sh        # from the folder of train_rm.py
#   python -m rm.report runs/sweep/*/ --output sweep.html       # at any time
#SBATCH --job-name=rm-sweep
#SBATCH --array=0-8%4
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/sweep/%a.log
#SBATCH --signal=B:USR1@180

config=${CONFIG:-configs/ultrafeedback_qwen.yaml}
rates=(3e-6 1e-5 3e-5)
seeds=(0 1 2)
rate=${rates[SLURM_ARRAY_TASK_ID / ${#seeds[@]}]}
seed=${seeds[SLURM_ARRAY_TASK_ID % ${#seeds[@]}]}

# USR1 comes from Slurm before the time limit: queue the task again. TERM (preemption): Slurm does that itself.
trap 'again=yes; kill -TERM $child' USR1
trap 'kill -TERM $child' TERM

python train_rm.py --config "$config" --learning_rate="$rate" --seed="$seed" \
    --output_dir="runs/sweep/$SLURM_ARRAY_TASK_ID" --resume_from_checkpoint=latest &
child=$!
wait $child
code=$?
while kill -0 $child 2>/dev/null; do # a trap ends `wait`, and the run is still writing its checkpoint
    wait $child
    code=$?
done
if [[ $again && $code != 0 ]]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit $code
