#!/usr/bin/env bash
# DeepSpeed's launcher, one process for each GPU; HOSTFILE names further machines:
#   HOSTFILE=hosts launch/deepspeed.sh experiment=taehv size=full …
set -euo pipefail
exec deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} "$(dirname "$0")/../train.py" "$@"
