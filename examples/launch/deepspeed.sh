#!/usr/bin/env bash
# Train with DeepSpeed's launcher, which reads the hosts from a hostfile of lines such as `node1 slots=8`.
#
# Over ssh: run the script once, on a host that can log in to all others without a password. pdsh must be installed.
#
#     HOSTFILE=hostfile examples/launch/deepspeed.sh run.yaml
#
# Without ssh: run the script on every host, with the number of the host in the hostfile, from 0.
#
#     HOSTFILE=hostfile NODE_RANK=1 MASTER_ADDR=node1 examples/launch/deepspeed.sh run.yaml
#
# The launcher restarts nothing. To resume, run the script again. To save and stop, send SIGUSR2 to one rank: each rank
# logs its process id and host.
set -euo pipefail

HOSTFILE=${HOSTFILE:-hostfile}
MASTER_PORT=${MASTER_PORT:-29500}            # a free port on the first host
MASTER_ADDR=${MASTER_ADDR:-}                 # address of the first host; over ssh, the launcher asks that host for it
NODE_RANK=${NODE_RANK:-}                     # empty: over ssh; a number: this host alone, without ssh

# Over ssh, the ranks get only the variables whose names begin with PYTHON, NCCL or UCX, and those in a file named
# `.deepspeed_env` in this folder or in your home, which holds one NAME=VALUE per line.
options=(--hostfile "$HOSTFILE" --master_port "$MASTER_PORT" --no_local_rank)
if [[ -n "$MASTER_ADDR" ]]; then
    options+=(--master_addr "$MASTER_ADDR")
fi
if [[ -n "$NODE_RANK" ]]; then
    options+=(--no_ssh --node_rank "$NODE_RANK")
else
    options+=(--launcher pdsh)
fi
exec deepspeed "${options[@]}" --module megatron_slm train "$@"
