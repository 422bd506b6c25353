#!/usr/bin/env bash
# One run on all GPUs of several machines that share a file system, by Slurm:
#     sbatch --nodes 2 --time 4:00:00 tools/slurm.sh --config config.yaml
# Two minutes before its time is over the run stops with a checkpoint, if a step takes less than the
# half minute that torchrun waits; to continue:
#     sbatch --nodes 2 --time 4:00:00 tools/slurm.sh --resume RUN_DIR
#SBATCH --job-name=scnf
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.txt
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" \
    torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node gpu --rdzv_backend c10d \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:29500" train-flow-ssl.py "$@"
