#!/usr/bin/env bash
# On each of several machines that share a file system, with its own NODE:
#   NODES=2 NODE=0 MASTER=first-host:29500 launch/torchrun.sh experiment=taehv size=full …
# PROCESSES is the number on a machine; without it, one for each GPU.
set -euo pipefail
master=${MASTER:-127.0.0.1:29500}
exec torchrun --nnodes="${NODES:-1}" --node-rank="${NODE:-0}" --nproc-per-node="${PROCESSES:-auto}" \
    --master-addr="${master%:*}" --master-port="${master##*:}" "$(dirname "$0")/../train.py" "$@"
