#!/usr/bin/env bash
# The noise experiment and its controls on checkpoints of several seeds, and one table with intervals over seeds and questions.
# bash scripts/across_seeds.sh [CHECKPOINT ...]   (without any: the quick start's, SEED=0 to 9, as far as they are trained)
# SETTINGS="num_questions=200 noise_type=gaussian" changes the experiment, OUT=results/mine where it goes. A rerun goes on.
# EXPERIMENT=ablation: the ablation of noisy branching (args/ablation.yaml) in its place.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${EXPERIMENT:-noise} in
    noise) default=results/across_seeds asked="noise_type=all" ;;
    ablation) default=results/across_seeds/ablation asked="" ;;
    *) echo "error: EXPERIMENT must be noise or ablation, is $EXPERIMENT" >&2; exit 2 ;;
esac
out=${OUT:-$default}
[[ $out == results/* ]] || { echo "error: OUT must be below results/, is $out" >&2; exit 2; }
source scripts/environment.sh
make_environment .venv requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

read -ra settings <<< "${SETTINGS:-$asked}"
launch=(.venv/bin/torchrun --standalone --nproc_per_node "${PROCESSES:-2}")
checkpoints=("$@")
if [ $# = 0 ]; then
    for run in checkpoints/quick-coconut checkpoints/seed[0-9]*/quick-coconut; do
        if [ -d "$run" ]; then checkpoints+=("$run"); fi
    done
fi
directories=()
for checkpoint in "${checkpoints[@]}"; do
    name=${checkpoint//\//_}
    directories+=("$out/$name")
    echo "== $checkpoint"
    if [ "${EXPERIMENT:-noise}" = ablation ]; then
        "${launch[@]}" -m experiments.ablation args/ablation.yaml load_model_path="$checkpoint" results_path=results \
            name="${out#results/}/$name" "${settings[@]}"
    else
        "${launch[@]}" test.py args/noise_sweep.yaml load_model_path="$checkpoint" name="${out#results/}/$name" \
            "controls=[zero, mean, other, pause]" "${settings[@]}"
    fi
done
.venv/bin/python -m experiments.across_seeds "$out" "${directories[@]}"
