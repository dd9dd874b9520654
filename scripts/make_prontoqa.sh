#!/usr/bin/env bash
# ProntoQA as in the paper: 10,000 questions of 5 hops from a clone of the official generator, then data/prontoqa_*.json.
#   git clone https://github.com/asaparov/prontoqa
#   bash scripts/make_prontoqa.sh prontoqa [options of preprocessing/prontoqa.py]
# A rerun goes on with the raw file that is there. PYTHON names an interpreter to use instead of this project's environment.
set -euo pipefail
fail() { echo "make_prontoqa.sh: error: $*" >&2; exit 2; }

[ $# -ge 1 ] || fail "usage: make_prontoqa.sh CLONE [OPTIONS], CLONE a clone of https://github.com/asaparov/prontoqa"
[ -d "$1" ] || fail "$1: no such directory; git clone https://github.com/asaparov/prontoqa makes the clone"
[ -f "$1/run_experiment.py" ] || fail "$1/run_experiment.py: no such file; is $1 a clone of https://github.com/asaparov/prontoqa?"
clone=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
source scripts/environment.sh
if [ -z "${PYTHON:-}" ]; then
    make_environment .venv requirements.txt
    PYTHON=$PWD/.venv/bin/python
fi

raw=$clone/5hop_0shot_random.json
# The generator writes the whole file as its last act: one that is no JSON was cut off.
complete() { [ -s "$raw" ] && "$PYTHON" -m json.tool "$raw" /dev/null 2>/dev/null; }

if complete; then
    echo "== 1/2 raw questions: $raw is there"
else
    echo "== 1/2 raw questions: the generator draws 10,000 (minutes)"
    # It reads and writes files by their bare names, so it has to run inside the clone.
    (cd "$clone" && "$PYTHON" run_experiment.py --model-name json --model-size dummy --ordering random --num-trials 10000 \
        --few-shot-examples 0 --ontology fictional --min-hops 5 --max-hops 5 --hops-skip 1) \
        || fail "the generator ended with exit code $?; its own message stands above"
    complete || fail "the generator wrote no usable $raw"
fi

echo "== 2/2 records"
"$PYTHON" preprocessing/prontoqa.py "$raw" "$@"
