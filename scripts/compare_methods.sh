#!/usr/bin/env bash
# All methods on the quick start's questions, five seeds: training, evaluation, table and figure.
# All methods of a seed start from one chain of thought of 12 epochs, that of the quick start (SEED=0 and so on) where it is
# there. Those with stages leave them by the same rule, that of args/prosqa_quick_coconut.yaml; the others take as many epochs as
# Coconut of the same seed. Runs come one after another, so that their times can be compared.
# SEEDS="0 1 2 3 4" METHODS="coconut cot" PROCESSES=2 may be set. A rerun skips what is done and goes on. Two commands with
# PROCESSES=1 and half of the seeds each use two cores better than one with PROCESSES=2; the command with all seeds then
# makes the table.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv requirements.txt

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
read -ra seeds <<< "${SEEDS:-0 1 2 3 4}"
read -ra methods <<< "${METHODS:-coconut cot no_cot no_thoughts no_curriculum pause pause_as_thought icot codi pccot simcot codi_simcot codi_kv}"
processes=${PROCESSES:-2} batch=64
save_path=checkpoints/compare data=data/prosqa_quick out=results/compare_methods
launch=(.venv/bin/torchrun --standalone --nproc_per_node "$processes")

if [ ! -e "${data}_test.json" ]; then
    .venv/bin/python preprocessing/prosqa.py --shape chains --out-prefix "$data" --train 40000 --valid 300 --test 1000 \
        --hops 2 3 --train-hops 1 2 2 3 3 3 --concepts 12 --names 8
fi
if [ ! -e "${data}_4hops_test.json" ]; then # one step more than any question in training
    .venv/bin/python preprocessing/prosqa.py --shape chains --out-prefix "${data}_4hops" --train 0 --valid 0 --test 1000 \
        --hops 4 --concepts 12 --names 8
fi
mkdir -p "$save_path"

quietly() { # LOG COMMAND...
    local log=$1
    shift
    echo "== $(basename "$log" .log)"
    "$@" > "$log" 2>&1 || { echo "error: see $log" >&2; return 1; }
}

epochs_of() { grep -c '"kind": "epoch"' "$save_path/$1/metrics.jsonl"; }

train() { # METHOD SEED
    local method=$1 seed=$2 name=$1-seed$2 settings=()
    if [ -e "$save_path/$name/finished" ]; then return; fi
    case $method in
        start) method=cot ;;
        coconut | no_thoughts | pause_as_thought | simcot) settings=(load_model_path="$save_path/start-seed$seed") ;;
        icot) settings=(load_model_path="$save_path/start-seed$seed" from_scratch=false num_epochs="$(epochs_of "coconut-seed$seed")") ;;
        *) settings=(load_model_path="$save_path/start-seed$seed" from_scratch=false 'marker_init="\n"' lr_schedule=linear
            num_epochs="$(epochs_of "coconut-seed$seed")") ;;
    esac
    quietly "$save_path/$name.log" "${launch[@]}" run.py "args/prosqa_quick_$method.yaml" save_path=$save_path name="$name" \
        seed="$seed" batch_size_training=$((batch / processes)) "${settings[@]}"
    whole "$save_path/$name.log"
    touch "$save_path/$name/finished"
}

link() { # METHOD QUICK SEED: the quick start's run, if it is finished, stands for METHOD-seedSEED
    local folder=checkpoints/quick-$2
    if [ "$3" != 0 ]; then folder=checkpoints/seed$3/quick-$2; fi
    if [ ! -e "$save_path/$1-seed$3" ] && compgen -G "$folder/eval/prosqa_quick_test-*" > /dev/null; then
        ln -s "../../$folder" "$save_path/$1-seed$3"
        touch "$folder/finished"
    fi
}

evaluate() { # METHOD SEED SUFFIX SETTINGS...: writes to METHOD-seedSEEDSUFFIX/eval
    local method=$1 name=$1-seed$2 suffix=$3
    shift 3
    quietly "$save_path/$name$suffix-eval.log" "${launch[@]}" run.py "args/prosqa_quick_$method.yaml" only_eval=true \
        from_scratch=false marker_init=null save_path=$save_path name="$name$suffix" load_model_path="$save_path/$name" "$@"
}

for seed in "${seeds[@]}"; do
    missing=()
    for method in "${methods[@]}"; do if [ ! -e "$save_path/$method-seed$seed/finished" ]; then missing+=("$method"); fi; done
    if [ ${#missing[@]} = 0 ]; then continue; fi # nor is its start needed
    link start cot "$seed"
    link coconut coconut "$seed"
    train start "$seed"
    train coconut "$seed"
    for method in "${missing[@]}"; do train "$method" "$seed"; done
done
for seed in "${seeds[@]}"; do
    for method in "${methods[@]}"; do
        name=$method-seed$seed
        if ! compgen -G "$save_path/$name/eval/$(basename "$data")_4hops_test-*" > /dev/null; then
            evaluate "$method" "$seed" "" val_path="${data}_4hops_test.json" batch_size_eval=250
        fi
        if [ -e "$save_path/$name/compared" ]; then continue; fi
        evaluate "$method" "$seed" "" val_path="${data}_test.json" batch_size_eval=250
        case $method in coconut | no_curriculum | pause | pause_as_thought | codi | pccot | simcot | codi_simcot | codi_kv)
            evaluate "$method" "$seed" "" val_path="${data}_test.json" batch_size_eval=250 eval_latents=0 ;;
        esac
        case $method in coconut | no_curriculum | codi | pccot | simcot | codi_simcot | codi_kv)
            quietly "$save_path/$name-others.log" "${launch[@]}" test.py args/noise_sweep.yaml name="compare_methods/$name" \
                load_model_path="$save_path/$name" data_path="${data}_test.json" num_questions=200 noise_type=gaussian_scaled \
                noise_scales="[1]" controls="[other]" ;;
        esac
        touch "$save_path/$name/compared"
    done
done
launch=(.venv/bin/python)
for method in "${methods[@]}"; do # one question at a time, in one process, alone on the machine, as the paper times them
    name=$method-seed${seeds[0]}-single
    if [ -e "$save_path/$name/compared" ]; then continue; fi
    evaluate "$method" "${seeds[0]}" -single val_path="${data}_valid.json" batch_size_eval=1
    touch "$save_path/$name/compared"
done
.venv/bin/python -m experiments.compare_methods "$save_path" "${data}_test.json" "$out" --seeds "${seeds[@]}" \
    --methods "${methods[@]}" --further "${data}_4hops_test.json"
