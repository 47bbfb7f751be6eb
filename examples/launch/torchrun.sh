#!/usr/bin/env bash
# Train with torchrun. Run this script on every node, with the same arguments:
#
#     examples/launch/torchrun.sh run.yaml                                          # one node, all its GPUs
#     NODES=4 RENDEZVOUS=node1:29500 examples/launch/torchrun.sh run.yaml seed=7    # on each of four nodes
#
# If a rank dies, torchrun starts all ranks again, and they resume from the last checkpoint. To resume a run that ended,
# run the script again. To save and stop, send SIGTERM to torchrun on one node, or SIGUSR2 to one rank.
set -euo pipefail

NODES=${NODES:-1}
RANKS_PER_NODE=${RANKS_PER_NODE:-gpu}        # a number, or `gpu`: one rank per GPU of the node
RENDEZVOUS=${RENDEZVOUS:-localhost:0}        # HOST:PORT, the same on all nodes; HOST is one of them, PORT is free there
RUN_ID=${RUN_ID:-megatron_slm}               # the same on all nodes; it tells runs apart that share a rendezvous
MAX_RESTARTS=${MAX_RESTARTS:-3}              # restarts by this node before torchrun gives up
SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-600}    # seconds for the ranks to finish a step and save, after SIGTERM

# Without this, a spare node waits for an address that torchrun writes only once, before the first start.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# `c10d` lets all nodes join again after a failure. With `static`, several nodes do not restart reliably.
# torchrun forwards the signals to the ranks of its node; the ranks of all nodes then stop after the same step.
exec torchrun \
    --nnodes "$NODES" \
    --nproc-per-node "$RANKS_PER_NODE" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$RENDEZVOUS" \
    --rdzv-id "$RUN_ID" \
    --max-restarts "$MAX_RESTARTS" \
    --shutdown-timeout "$SHUTDOWN_TIMEOUT" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 \
    -m megatron_slm train "$@"
