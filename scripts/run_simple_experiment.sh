#!/usr/bin/env bash
# One noise sweep: accuracy against the scale of every noise type, greedy, without branches.
#   bash scripts/run_simple_experiment.sh [key=value ...]                             # on this machine
#   PARTITION=gpu bash scripts/run_simple_experiment.sh --submit [key=value ...]      # as a SLURM job
# key=value and further YAML files go to test.py, noise_type=snr for one. What else may be set: see scripts/run_experiment.sh.
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -euo pipefail
partition=${PARTITION:-} account=${ACCOUNT:-} gpus=${GPUS:-1} cpus=${CPUS:-8} time_limit=${TIME_LIMIT:-12:00:00}

root=$(dirname "$0")/..
[ -e "$root/scripts/job.sh" ] || root=. # SLURM runs a copy of this file, in the directory of the submission
cd "$root"
source scripts/job.sh

if [ "${1:-}" = --submit ]; then
    submit run_simple_experiment "${@:2}"
else
    launch test.py args/noise_sweep.yaml noise_type=all name=noise_scale_all "$@"
fi
