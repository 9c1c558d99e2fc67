#!/usr/bin/env bash
# One process for each visible GPU of this machine: launch/node.sh experiment=taehv size=full …
# CUDA_VISIBLE_DEVICES=0,1 in front takes these two only.
set -euo pipefail
exec python "$(dirname "$0")/../train.py" launcher.processes=auto "$@"
