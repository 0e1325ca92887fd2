#!/usr/bin/env bash
# One machine, by torchrun: a process for every GPU, or PROCESSES of them.
#   launch/torchrun.sh train CONFIG --out RUN
#   PROCESSES=2 ACCELERATE_USE_CPU=true launch/torchrun.sh train CONFIG --out RUN
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "${PROCESSES:-gpu}" -m sitdist "$@"
