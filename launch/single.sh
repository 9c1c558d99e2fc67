#!/usr/bin/env bash
# One process on this machine: launch/single.sh experiment=taehv size=full paths.data=/clips paths.weights=/weights
set -euo pipefail
exec python "$(dirname "$0")/../train.py" launcher.processes=1 "$@"
