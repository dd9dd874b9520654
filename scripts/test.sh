#!/usr/bin/env bash
# All checks: lint, types, all tests, and the model tests again with the oldest supported transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled HF_HUB_OFFLINE=1

make_environment .venv-oldest requirements-oldest.txt &
oldest=$!
make_environment .venv requirements-dev.txt
wait "$oldest"
echo "== ruff and mypy"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy

version() { "$1/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'; }
echo "== all tests ($(version .venv)); beside them the model tests with the oldest supported ($(version .venv-oldest))"
log=$(mktemp)
# The files in configs/ were written with the newest version; they must load with the oldest, not be written alike.
.venv-oldest/bin/python -m pytest -q tests/test_coconut.py tests/test_models.py tests/test_loading.py tests/test_dataset.py \
    tests/test_word_tokenizer.py tests/test_lora.py tests/test_generation.py tests/test_last_layer.py \
    tests/test_activation_checkpointing.py tests/test_security.py \
    -k "not files_in_configs_are_what_the_command_writes" > "$log" 2>&1 &
oldest=$!
trap 'kill "$oldest" 2> /dev/null || true; rm -f "$log"' EXIT
failed=0
.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@" || failed=$? # else the slowest files come last
wait "$oldest" || failed=$?
echo "== model tests with the oldest supported ($(version .venv-oldest))"
cat "$log"
exit "$failed"
