#!/usr/bin/env bash
# Train with Open MPI's mpirun, which reads the hosts from a hostfile of lines such as `node1 slots=8`. Run the script
# once, on a host that can log in to all others by ssh without a password.
#
#     HOSTFILE=hostfile examples/launch/mpirun.sh run.yaml
#
# mpirun restarts nothing. To resume, run the script again. To save and stop, send SIGUSR2 to mpirun, which forwards it
# to all ranks. Do not send SIGTERM: mpirun kills the ranks before they can save.
#
# MPICH and Intel MPI write the hostfile as `node1:8`, and the last command as
#     mpiexec -f "$HOSTFILE" -genvall -genv MASTER_ADDR "$MASTER_ADDR" -genv MASTER_PORT "$MASTER_PORT" python -m ...
set -euo pipefail

HOSTFILE=${HOSTFILE:-hostfile}
MASTER_ADDR=${MASTER_ADDR:-$(awk 'NF && $1 !~ /^#/ {print $1; exit}' "$HOSTFILE")}    # the host of rank 0: the first
MASTER_PORT=${MASTER_PORT:-29500}                                                     # a free port on that host
EXPORT=${EXPORT:-'^(PATH|LD_LIBRARY_PATH|(PYTHON|CUDA_|NCCL_|HF_|OMP_|DS_).*)$'}      # variables that the ranks get

export MASTER_ADDR MASTER_PORT
exports=(-x MASTER_ADDR -x MASTER_PORT)
for name in $(compgen -e); do
    if [[ "$name" =~ $EXPORT ]]; then
        exports+=(-x "$name")
    fi
done
# One rank per slot, host by host. Without `--bind-to none`, Open MPI binds each rank to one core.
exec mpirun --hostfile "$HOSTFILE" --map-by slot --bind-to none "${exports[@]}" python -m megatron_slm train "$@"
