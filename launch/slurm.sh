#!/usr/bin/env bash
# Any number of machines under Slurm, one task a GPU. Two minutes before the time limit every task gets SIGTERM, saves
# and exits with 75; the job then puts itself back into the queue and goes on from its checkpoint.
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 launch/slurm.sh train CONFIG --out RUN
#   sbatch --nodes 1 --gpus-per-node 8 --ntasks-per-node 8 launch/slurm.sh eval RUN --radii 1:7 --views-per-radius 200
# Partition, account and time limit are options of sbatch too. RUN and the dataset are on storage that all nodes share.
#SBATCH --job-name=sitdist
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

trap 'exit 143' TERM  # scancel reaches this script as well: then the job does not come back

# No torchrun in between, so that exit codes and signals arrive as they are.
srun --kill-on-bad-exit=0 --wait=60 bash -c '
  export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE="$((SLURM_NTASKS / SLURM_NNODES))"
  exec "${PYTHON:-python}" -m sitdist "$@"
' sitdist "$@"
code=$?

if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
