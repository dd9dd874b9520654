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

echo "== model tests with the oldest supported transformers ($(.venv-oldest/bin/python -c 'import transformers; print(transformers.__version__)'))"
# The files in configs/ were written with the newest version; they must load with the oldest, not be written alike.
.venv-oldest/bin/python -m pytest -q tests/test_coconut.py tests/test_models.py tests/test_dataset.py tests/test_word_tokenizer.py \
    tests/test_adapters.py tests/test_branching.py \
    -k "not files_in_configs_are_what_the_command_writes"

echo "== all tests ($(.venv/bin/python -c 'import transformers; print("transformers", transformers.__version__)'))"
.venv/bin/python -m pytest -q "$@"
