#!/usr/bin/env bash
#SBATCH --job-name=slm-7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=48:00:00
#SBATCH --signal=USR2@600
# srun starts one process per GPU. Ten minutes before the time limit, all of them save a checkpoint and stop. To resume,
# submit the same script again.
set -euo pipefail
srun python -m megatron_slm train examples/continue_7b/run.yaml
