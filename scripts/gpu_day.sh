#!/usr/bin/env bash
# The GPU rows of benchmarks/RESULTS.md, in three pieces of at most nine minutes on one GPU: bash scripts/gpu_day.sh 1, then 2, 3.
#   1  one training step and one answer of GPT-2 124M: float32, bfloat16, bfloat16 compiled; the operations of a pass
#   2  one epoch of ProsQA in the first and in the last stage: coconut, pause_as_thought, cot; questions a second, MFU
#   3  the ProsQA recipe, 50 epochs; call it again until it says that the run is finished (scripts/race.sh)
# What is printed is added to results/gpu_day/PIECE.txt. TINY=1 tries it on any machine, without the compiler, which
# takes minutes on a CPU: the numbers then mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

piece=${1:-}
case $piece in 1 | 2 | 3) ;; *) echo "error: which piece? bash scripts/gpu_day.sh 1, 2 or 3" >&2; exit 2 ;; esac
make_environment .venv requirements.txt
out=results/gpu_day
mkdir -p "$out"
exec > >(tee -a "$out/$piece.txt")
echo "== $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"

tiny=() parts=("coconut 0 6" "pause_as_thought 0 6" "cot 0") batch=128 rows=32 questions=64 seconds=100
if [ -n "${TINY:-}" ]; then
    tiny=(--tiny --no-memory --repeats 1 --warmup 0) parts=("coconut 1" "cot 0") batch=4 rows=4 questions=2 seconds=60
    export CONFIG=configs/gpt2_small SETTINGS="max_new_tokens=2 num_workers=0 num_epochs=1 ${SETTINGS:-}"
fi
measure() { # BENCHMARK OPTIONS...
    echo "== benchmarks/$*"
    .venv/bin/python "benchmarks/$1.py" "${@:2}" ${tiny[@]+"${tiny[@]}"}
}

case $piece in
    1)
        measure overhead
        measure train_step --batch-size $rows --naive-rows 4
        measure train_step --batch-size $rows --naive-rows 4 --bf16
        if [ -z "${TINY:-}" ]; then measure train_step --batch-size $rows --naive-rows 4 --bf16 --compile --warmup 3 --no-memory; fi
        measure generate --batch-size $questions --repeats 2
        ;;
    2)
        for part in "${parts[@]}"; do # METHOD STAGES...
            METHOD=${part%% *} RUN=gpu-day-${part%% *} PARTS=${part#* } PIECE=$seconds BATCH=$batch bash scripts/race.sh
        done
        ;;
    3) RUN=gpu-day PIECE=${PIECE:-520} BATCH=$batch bash scripts/race.sh ;;
esac
