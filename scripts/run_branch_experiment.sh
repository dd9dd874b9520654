#!/usr/bin/env bash
# Branching and voting: five noisy branches of each question, their votes by every rule, coverage against accuracy.
#   bash scripts/run_branch_experiment.sh [key=value ...]                             # on this machine
#   PARTITION=gpu bash scripts/run_branch_experiment.sh --submit [key=value ...]      # as a SLURM job
# key=value and further YAML files go to run_noisy_experiment.py. What else may be set: see scripts/run_experiment.sh.
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
    submit run_branch_experiment "${@:2}"
else
    launch run_noisy_experiment.py args/noisy_coconut.yaml num_branches=5 "$@"
fi
