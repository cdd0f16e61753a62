#!/usr/bin/env bash
# Run on each of two hosts that share storage: two_hosts.sh FIRST_HOST DATA OUTPUT
# A host that comes back within the rendezvous' time joins again, and the run goes on from its newest checkpoint.
set -euo pipefail
exec torchrun \
  --nnodes 2 --nproc-per-node "${GPUS:-8}" --max-restarts 10 \
  --rdzv-backend c10d --rdzv-endpoint "$1:29500" --rdzv-id "$(basename "$3")" \
  -m llamahome train "$2" --output "$3"
