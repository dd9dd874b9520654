#!/usr/bin/env bash
# All eight methods on the quick start's questions, from scratch, three seeds each: training, evaluation, table and figure.
# Every run gets the same 16 epochs of 6,400 examples. A rerun skips what is done and goes on with what was interrupted.
# SEEDS="0 1 2" METHODS="coconut cot" JOBS=2 (runs side by side, one thread each) may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv requirements.txt

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
read -ra seeds <<< "${SEEDS:-0 1 2}"
read -ra methods <<< "${METHODS:-coconut cot no_cot no_thoughts no_curriculum pause pause_as_thought icot}"
jobs=${JOBS:-2}
save_path=checkpoints/compare data=data/prosqa_quick out=results/compare_methods epochs=16
# Seeds 0 and 1 of the quick start's Coconut needed at most so many epochs in stages 0 to 3.
schedule="epochs_per_stage=[7,1,4,4] advance_accuracy=null advance_cot_match=null"

if [ ! -e "${data}_test.json" ]; then
    .venv/bin/python preprocessing/prosqa.py --shape chains --out-prefix "$data" --train 40000 --valid 300 --test 1000 \
        --hops 2 3 --train-hops 1 2 2 3 3 3 --concepts 12 --names 8
fi
mkdir -p "$save_path"

train() { # METHOD SEED
    local method=$1 name=$1-seed$2 settings=""
    if [ -e "$save_path/$name/checkpoint_$epochs/coconut.json" ]; then return; fi
    case $method in coconut | no_thoughts | pause_as_thought) settings=$schedule ;; esac
    echo "== training $name"
    # shellcheck disable=SC2086
    .venv/bin/python run.py "args/prosqa_quick_$method.yaml" save_path=$save_path name="$name" seed="$2" num_epochs=$epochs \
        batch_size_training=64 $settings > "$save_path/$name.log" 2>&1 || { echo "error: see $save_path/$name.log" >&2; return 1; }
}

evaluate() { # METHOD SEED SUFFIX SETTINGS...: writes to METHOD-seedSEEDSUFFIX/eval
    local method=$1 name=$1-seed$2 suffix=$3
    shift 3
    if compgen -G "$save_path/$name$suffix/eval/*/predictions_$epochs.jsonl" > /dev/null; then return; fi
    echo "== evaluating $name$suffix"
    .venv/bin/python run.py "args/prosqa_quick_$method.yaml" only_eval=true from_scratch=false save_path=$save_path \
        name="$name$suffix" load_model_path="$save_path/$name" "$@" > "$save_path/$name$suffix-eval.log" 2>&1 ||
        { echo "error: see $save_path/$name$suffix-eval.log" >&2; return 1; }
}

export -f train
export save_path epochs schedule
for seed in "${seeds[@]}"; do
    for method in "${methods[@]}"; do echo "$method $seed"; done
done | xargs -P "$jobs" -L 1 bash -c 'train "$@"' _

for seed in "${seeds[@]}"; do
    for method in "${methods[@]}"; do
        evaluate "$method" "$seed" "" val_path="${data}_test.json" batch_size_eval=250
    done
done
for method in "${methods[@]}"; do # one question at a time, alone on the machine, as the paper times them
    evaluate "$method" "${seeds[0]}" -single val_path="${data}_valid.json" batch_size_eval=1
done
.venv/bin/python -m experiments.compare_methods "$save_path" "${data}_test.json" "$out" --seeds "${seeds[@]}" --methods "${methods[@]}"
