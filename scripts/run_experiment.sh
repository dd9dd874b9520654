#!/usr/bin/env bash
# NoisyCoconut on all questions of a benchmark: noisy branches at every scale, voting, abstention, decay fits, figures.
#   BENCHMARK=gsm8k bash scripts/run_experiment.sh [key=value ...]                    # on this machine, all its GPUs
#   PARTITION=gpu GPUS=4 bash scripts/run_experiment.sh --submit [key=value ...]      # as a SLURM job
# key=value and further YAML files go to run_noisy_experiment.py. May be set: the variables in capitals below, PROCESSES (default: one
# a GPU, else 1), PYTHON (default: this project's environment), and SBATCH_QOS and the like, which sbatch reads.
# Stopped by the time limit, preemption, SIGTERM or Ctrl-C it has saved what is done; the job is queued again and goes on.
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -euo pipefail
partition=${PARTITION:-} account=${ACCOUNT:-} gpus=${GPUS:-4} cpus=${CPUS:-16} time_limit=${TIME_LIMIT:-24:00:00}
benchmark=${BENCHMARK:-gsm8k}

root=$(dirname "$0")/..
[ -e "$root/scripts/job.sh" ] || root=. # SLURM runs a copy of this file, in the directory of the submission
cd "$root"
source scripts/job.sh

if [ "${1:-}" = --submit ]; then
    submit run_experiment "${@:2}"
else
    launch run_noisy_experiment.py args/noisy_coconut.yaml benchmark="$benchmark" name="noisy_coconut_$benchmark" \
        num_questions=null "$@"
fi
