#!/usr/bin/env bash
# From nothing to a trained Coconut: environment, data, chain of thought, its stages as thoughts, a control, evaluation, noise
# in the thoughts, summary, figures.
# Two CPU cores are enough. A rerun goes on where the last one stopped; FRESH=1 starts over. SEED=1 trains another model.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv requirements.txt
began=$(date +%s)

# One process with two threads: less to start, and no slower than two processes where these share a core.
processes=${PROCESSES:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((processes == 1 ? 2 : 1))} TOKENIZERS_PARALLELISM=false
launch=(.venv/bin/python)
if [ "$processes" != 1 ]; then launch=(.venv/bin/torchrun --standalone --nproc_per_node "$processes"); fi
seed=${SEED:-0} save_path=checkpoints data=data/prosqa_quick out=results/quickstart
if [ "$seed" != 0 ]; then save_path=checkpoints/seed$seed out=results/quickstart-seed$seed; fi
if [ -n "${FRESH:-}" ]; then rm -rf "$save_path"/quick-* "$out"; [ "$seed" != 0 ] || rm -f "$data"_*.json; fi
run() {
    "${launch[@]}" run.py "$@" seed="$seed" save_path="$save_path" batch_size_training=$((64 / processes))
}

echo "== 1/6 data: questions over two chains, made from a seed"
if [ ! -e "${data}_test.json" ]; then
    .venv/bin/python preprocessing/prosqa.py --shape chains --out-prefix "$data" --train 40000 --valid 300 --test 1000 \
        --hops 2 3 --train-hops 1 2 2 3 3 3 --concepts 12 --names 8
fi

echo "== 2/6 chain of thought from scratch, and from it Coconut stage by stage"
run args/prosqa_quick_cot.yaml
run args/prosqa_quick_coconut.yaml load_model_path="$save_path/quick-cot"

epochs=$(cat "$save_path"/quick-{cot,coconut}/metrics.jsonl | grep -c '"kind": "epoch"')
echo "== 3/6 control: no chain of thought, the same examples ($epochs epochs)"
run args/prosqa_quick_no_cot.yaml num_epochs="$epochs"

echo "== 4/6 evaluation on the test set"
for method in cot coconut no-cot; do
    rm -rf "$save_path/quick-$method/eval"
    run "args/prosqa_quick_${method/-/_}.yaml" only_eval=true from_scratch=false \
        load_model_path="$save_path/quick-$method" val_path="${data}_test.json" batch_size_eval=250
done

echo "== 5/6 noise in the thoughts, and other thoughts in their place"
"${launch[@]}" test.py args/noise_sweep.yaml name="${out#results/}/noise" \
    load_model_path="$save_path/quick-coconut" data_path="${data}_test.json" num_questions=200 noise_type=gaussian_scaled \
    controls="[zero, mean, other, pause]"

echo "== 6/6 summary"
.venv/bin/python -m experiments.quickstart "$save_path" "${data}_test.json" "$out" --seconds $(($(date +%s) - began))
echo "figures, metrics and predictions: $out"
