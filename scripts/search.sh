#!/usr/bin/env bash
# Search without shortcuts: six methods on symbolic graphs in which no rule that ignores the person is right more often than
# half of the time, in training and in test; three seeds; table and learning curves in results/search.
# A model of two layers (configs/llama_symbolic, 0.33M parameters) first learns to follow edges, on chains without options, and
# then to write the steps of the questions, 12 epochs each: once with Coconut's markers before the steps, where the methods with
# thoughts or pauses begin, and once without, where the others do. From there all take the same number of examples: those with
# stages 5 epochs of each stage and 10 of the last, in which the learning rate falls to 0.
# SEEDS="0 1 2" METHODS="coconut cot" may be set. A rerun skips what is done and goes on. Two commands with half of the seeds
# each use two cores; the command with all seeds then makes the table.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv requirements.txt

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
read -ra seeds <<< "${SEEDS:-0 1 2}"
read -ra methods <<< "${METHODS:-coconut pause_as_thought no_thoughts no_curriculum cot no_cot}"
save_path=checkpoints/search questions=data/prosqa_symbolic_search walks=data/prosqa_symbolic_walk out=results/search
mkdir -p "$save_path"

if [ ! -e "${questions}_test.json" ]; then .venv/bin/python preprocessing/prosqa.py --shape search --symbolic; fi
if [ ! -e "${walks}_valid.json" ]; then .venv/bin/python preprocessing/prosqa.py --shape walk --symbolic; fi

model=(model_id=configs/llama_symbolic c_thought=1 max_latent_stage=4 save_path=$save_path)
start=(num_epochs=12 examples_per_epoch=12800)
search=(train_path="${questions}_train.json" val_path="${questions}_valid.json" from_scratch=false group_by_length=true)
staged=(epochs_per_stage="[12, 5, 5, 5, 5, 10]" advance_accuracy=null advance_cot_match=null marker_init=null)

quietly() { # LOG COMMAND...
    local log=$1
    shift
    "$@" >> "$log" 2>&1 || { echo "error: see $log" >&2; return 1; }
}

train() { # ARGS_FILE RUN SETTINGS...
    local file=args/prosqa_quick_$1.yaml run=$2
    shift 2
    if [ -e "$save_path/$run/finished" ]; then return; fi
    echo "== $run"
    quietly "$save_path/$run.log" .venv/bin/python run.py "$file" "${model[@]}" name="$run" batch_size_training=64 "$@"
    whole "$save_path/$run.log"
    touch "$save_path/$run/finished"
}

without_map() { # RUN COPY: pauses take no state, so a checkpoint for them has no thought map
    if [ -e "$save_path/$2" ]; then return; fi
    .venv/bin/python -c "if True:
        from coconut import Coconut
        from thoughts import ThoughtMap
        model = Coconut.from_pretrained('$save_path/$1')
        model.thought_map = ThoughtMap()
        model.save_pretrained('$save_path/$2')"
}

evaluate() { # METHOD RUN SETTINGS...
    local file=args/prosqa_quick_$1.yaml run=$2
    shift 2
    quietly "$save_path/$run-eval.log" .venv/bin/python run.py "$file" "${model[@]}" name="$run" only_eval=true \
        load_model_path="$save_path/$run" from_scratch=false marker_init=null val_path="${questions}_test.json" \
        batch_size_eval=250 "$@"
}

for seed in "${seeds[@]}"; do
    for method in "${methods[@]}"; do
        run=$method-seed$seed form=plain file=cot begin=() settings=() length=(num_epochs=30)
        if [ -e "$save_path/$run/compared" ]; then continue; fi
        case $method in coconut | pause_as_thought | no_thoughts) settings=("${staged[@]}" resume=12) length=(num_epochs=42) ;; esac
        case $method in coconut | pause_as_thought | no_curriculum)
            form=marked file=coconut begin=("${staged[@]}" resume=0) ;;
        esac
        train $file "walk-$form-seed$seed" seed="$seed" "${start[@]}" "${begin[@]}" from_scratch=true load_model_path=None \
            train_path="${walks}_train.json" val_path="${walks}_valid.json"
        train $file "start-$form-seed$seed" seed="$seed" "${start[@]}" "${begin[@]}" "${search[@]}" \
            load_model_path="$save_path/walk-$form-seed$seed"
        if [ "$method" = pause_as_thought ]; then
            without_map "start-marked-seed$seed" "start-unmapped-seed$seed"
            form=unmapped
        fi
        train "$method" "$run" seed="$seed" "${length[@]}" examples_per_epoch=9600 "${settings[@]}" "${search[@]}" \
            load_model_path="$save_path/start-$form-seed$seed" lr_schedule=linear
        evaluate "$method" "$run" "${length[@]}" "${settings[@]}"
        case $method in coconut | pause_as_thought | no_curriculum)
            evaluate "$method" "$run" "${length[@]}" "${settings[@]}" eval_latents=0 ;;
        esac
        case $method in coconut | no_curriculum)
            quietly "$save_path/$run-eval.log" .venv/bin/python test.py args/noise_sweep.yaml name="search/$run" \
                load_model_path="$save_path/$run" data_path="${questions}_test.json" num_questions=200 \
                noise_type=gaussian_scaled noise_scales="[1]" controls="[other]" ;;
        esac
        touch "$save_path/$run/compared"
    done
done
.venv/bin/python -m experiments.compare_methods "$save_path" "${questions}_test.json" "$out" --seeds "${seeds[@]}" \
    --methods "${methods[@]}" --title "Search without shortcuts"
