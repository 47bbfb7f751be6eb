#!/usr/bin/env bash
#SBATCH --job-name=slm-7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=48:00:00
# srun starts one process a GPU. A job that is killed and submitted again resumes where its run folder stands.
set -euo pipefail
srun python -m megatron_slm train examples/continue_7b/run.yaml
