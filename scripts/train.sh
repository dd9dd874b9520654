#!/usr/bin/env bash
# Train on this machine, on all its GPUs, else in PROCESSES processes (1); under SLURM see scripts/run_training.sbatch.
#   bash scripts/train.sh args/prosqa_coconut.yaml [key=value ...]
#   PROCESSES=2 bash scripts/train.sh args/prosqa_quick_cot.yaml batch_size_training=32
# SIGTERM, SIGUSR1 and Ctrl-C make the workers save, and this ends with 0; torchrun by itself would give them 30 seconds and end
# with 1. May be set: MAX_RESTARTS (0), how often torchrun starts the workers again after one died; PYTHON, as in run_experiment.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/job.sh

unset SLURM_JOB_ID SLURM_RESTART_COUNT # of an interactive job, which is not queued again
export PET_MAX_RESTARTS=${MAX_RESTARTS:-0}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else workers started again may read the addresses of the dead ones
launch run.py "$@"
