#!/usr/bin/env bash
# With a config file that `accelerate config` wrote: launch/accelerate.sh my_accelerate.yaml experiment=taehv size=full …
# It says how many processes there are and where; precision and strategy are vireo's.
set -euo pipefail
config=$1
shift
exec accelerate launch --config_file "$config" "$(dirname "$0")/../train.py" "$@"
