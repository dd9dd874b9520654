#!/usr/bin/env bash
# A small pretrained model on GSM8K: chain of thought; then, each from its weights, Coconut, CODI, and CODI + SIM-CoT.
#   MODEL=DIRECTORY [GGUF=FILE_IN_IT] [DATA=data/gsm8k] bash scripts/smollm2.sh
# DATA is the prefix of what preprocessing/gsm8k.py writes. CoT on 2,560 questions takes about half an hour for SmolLM2-135M on one
# core of a CPU that has bfloat16 (in float32 40 minutes to hours); the others get fewer, as a question costs them more.
# TIMES=6 gives each six times as many. METHODS="cot codi" may be set; a rerun goes on. Each then answers the first 300 test
# questions, those with thoughts also without them; each one's accuracy is printed.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
if [ -z "${MODEL:-}" ]; then echo "error: MODEL is missing: a directory of transformers, or of a GGUF file named by GGUF" >&2; exit 2; fi
if [ ! -e "${DATA:-data/gsm8k}_train.json" ]; then
    echo "error: ${DATA:-data/gsm8k}_train.json: no such file; preprocessing/gsm8k.py makes it" >&2
    exit 2
fi
make_environment .venv requirements.txt

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
read -ra methods <<< "${METHODS:-cot coconut codi codi_simcot}"
times=${TIMES:-1} data=${DATA:-data/gsm8k} save_path=checkpoints/smollm2
bf16=$(.venv/bin/python -c "import torch; from systems.machine import has_bfloat16
print(torch.cuda.is_available() or has_bfloat16())")
always=(model_id="$MODEL" gguf_file="${GGUF:-null}" save_path=$save_path bf16=$bf16 wandb=disabled num_workers=0 batch_size_eval=50)
mkdir -p "$save_path"

first() { # COUNT FROM TO
    .venv/bin/python -c "import json, sys; json.dump(json.load(open(sys.argv[2]))[:int(sys.argv[1])], open(sys.argv[3], 'w'))" "$@"
}
first 20 "${data}_valid.json" "$save_path/valid.json" # after each stage, to see that it learns
first 300 "${data}_test.json" "$save_path/test.json"

run() { # METHOD NAME LOG SETTINGS...
    local method=$1 name=$2 log=$save_path/$3.log
    shift 3
    echo "== $(basename "$log" .log)"
    .venv/bin/torchrun --standalone --nproc_per_node 1 run.py "args/gsm_$method.yaml" "${always[@]}" name="$name" "$@" > "$log" 2>&1 ||
        { echo "error: see $log" >&2; return 1; }
}

train() { # METHOD
    local all_weights=(lora_r=null lora_alpha=null lora_dropout=null lora_target_modules=null) questions settings
    case $1 in # Coconut's stages have 512 each; a question of CODI is two sequences
        cot) questions=2560 settings=(num_epochs=1) ;;
        coconut) questions=512 settings=(load_model_path=$save_path/cot epochs_per_stage=1 resume=1 num_epochs=5) ;;
        codi) questions=1280 settings=(load_model_path=$save_path/cot num_epochs=1 'thought_map={name: projection, width: 576}') ;;
        codi_simcot) questions=1024 settings=(load_model_path=$save_path/cot num_epochs=1 'thought_map={name: projection, width: 576}') ;;
    esac
    run "$1" "$1" "$1" "${all_weights[@]}" "${settings[@]}" seed=0 lr=1e-4 lr_schedule=linear warmup_share=0.05 grad_clip=1.0 \
        weight_decay=0.01 reset_optimizer=false batch_size_training=8 gradient_accumulation_steps=2 group_by_length=true \
        examples_per_epoch=$((questions * times)) \
        train_path="${data}_train.json" val_path=$save_path/valid.json save_only_improve=false save_every_steps=20 keep_last=1 log_every=5
    whole "$save_path/$1.log"
    touch "$save_path/$1/finished"
}

evaluate() { # METHOD LATENTS
    run "$1" "$1" "$1-$2" only_eval=true load_model_path="$save_path/$1" val_path=$save_path/test.json eval_latents="$2"
    touch "$save_path/$1/answered-$2"
}

for method in "${methods[@]}"; do
    if [ ! -e "$save_path/$method/finished" ]; then train "$method"; fi
    if [ ! -e "$save_path/$method/answered-gold" ]; then evaluate "$method" gold; fi
    if [ "$method" != cot ] && [ ! -e "$save_path/$method/answered-0" ]; then evaluate "$method" 0; fi
done
for log in "$save_path"/*-gold.log "$save_path"/*-0.log; do echo "$(basename "$log" .log) thoughts: $(grep -o "accuracy .*" "$log")"; done
