#!/usr/bin/env bash
# All GPUs of this host share one run: one_host.sh DATA OUTPUT
set -euo pipefail
exec llamahome train "$1" --output "$2" --nproc "${GPUS:-$(nvidia-smi --list-gpus | wc -l)}" --set training.retries=3
