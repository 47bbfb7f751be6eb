#!/usr/bin/env bash
#SBATCH --job-name=slm-7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=48:00:00
#SBATCH --signal=USR2@600
# srun starts one process a GPU. Ten minutes before the time is up, all of them save and stop; submit the same script
# again, then or after a kill, and the run goes on where its folder stands.
set -euo pipefail
srun python -m megatron_slm train examples/continue_7b/run.yaml
