#!/usr/bin/env bash
# Any trained run on questions unlike those it was trained on, and one table: bash scripts/out_of_distribution.sh RUN [FILE ...]
# Without files: ProsQA's test set, the depth-matched one, and graphs of 7 and of 8 hops, any acyclic graphs, dense graphs
# (made where they are missing). Settings of run.py come from SETTINGS="batch_size_eval=64". PROCESSES=4 for as many.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# = 0 ]; then
    echo "error: bash scripts/out_of_distribution.sh RUN [FILE ...]: RUN is the directory of a trained run, as checkpoints/prosqa-coconut" >&2
    exit 2
fi
source scripts/environment.sh
make_environment .venv requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

run=$1
shift
files=("$@")
read -ra settings <<< "${SETTINGS:-}"
if [ ${#files[@]} = 0 ]; then
    files=(data/prosqa_test.json data/prosqa_matched_test.json)
    for shape in 7hop 8hop dag dense; do
        files+=("data/prosqa_${shape}_test.json")
        if [ ! -e "data/prosqa_${shape}_test.json" ]; then .venv/bin/python preprocessing/prosqa.py --shape "$shape"; fi
    done
fi
for file in "${files[@]}"; do
    echo "== $file"
    .venv/bin/torchrun --standalone --nproc_per_node "${PROCESSES:-2}" run.py "$run/config.yaml" only_eval=true from_scratch=false \
        load_model_path="$run" val_path="$file" "${settings[@]}"
done
.venv/bin/python -m experiments.out_of_distribution "$run" "${files[@]}"
