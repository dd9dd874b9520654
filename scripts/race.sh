#!/usr/bin/env bash
# How fast is the ProsQA recipe on this machine? All 50 epochs with evaluation, in pieces of at most nine minutes.
# Each call trains one piece, goes on exactly where the last one stopped, and prints questions a second by stage, the share of
# the machine's matrix rate, and the time spent and still to come. Call it until it says that the run is finished.
# MODEL=DIRECTORY trains another model than GPT-2 124M from random weights (a local GPT-2, for instance), CONFIG=DIRECTORY one of
# another size; PARTS="0 6" measures one epoch of these stages alone. PIECE=520 seconds, BATCH=128, METHOD=coconut and
# SETTINGS="key=value ..." may be set. On a GPU it is bfloat16 and compiled.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv requirements.txt

export TOKENIZERS_PARALLELISM=false
method=${METHOD:-coconut} run=${RUN:-race-$method} save_path=${SAVE_PATH:-checkpoints} piece=${PIECE:-520}
read -ra settings <<< "${SETTINGS:-}"
model=${MODEL:-}
if [ -z "$model" ]; then # random weights, kept, so that each stage can start from them
    model=$save_path/race-start
    if [ ! -e "$model" ]; then
        .venv/bin/python -c "if True:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
            torch.manual_seed(0)
            source = '${CONFIG:-configs/gpt2_124m}'
            AutoTokenizer.from_pretrained(source).save_pretrained('$model.partial')
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained('$model.partial')"
        mv "$model.partial" "$model"
    fi
fi
if .venv/bin/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    settings=(bf16=true compile=true ${settings[@]+"${settings[@]}"})
fi
if [ ! -e data/prosqa_train.json ]; then .venv/bin/python preprocessing/prosqa.py; fi

train() { # NAME SETTINGS...: returns 0 when the run is finished, and 1 when its time is up
    local name=$1 code=0
    shift
    timeout --signal=TERM --kill-after=20 "$piece" .venv/bin/python run.py "args/prosqa_$method.yaml" name="$name" model_id="$model" \
        save_path="$save_path" batch_size_training="${BATCH:-128}" wandb=disabled ${settings[@]+"${settings[@]}"} "$@" || code=$?
    if [ $code != 0 ] && [ $code != 124 ]; then exit $code; fi
    .venv/bin/python -m experiments.race "$save_path/$name"
    return $((code != 0))
}

stopped="stopped after $piece seconds; the same command goes on"
if [ -n "${PARTS:-}" ]; then
    for stage in $PARTS; do
        train "$run-stage$stage" resume=$((5 * stage)) num_epochs=$((5 * stage + 1)) || echo "$stopped"
    done
elif train "$run"; then echo "finished: $save_path/$run"; else echo "$stopped"; fi
