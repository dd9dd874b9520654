#!/usr/bin/env bash
# What a table needs of trained runs, in one archive small enough to commit: bash scripts/keep_runs.sh ARCHIVE FOLDER [FOLDER ...]
# For instance: bash scripts/keep_runs.sh results/kept/search.tar.gz checkpoints/search/coconut-seed? results/search/coconut-seed?
# `tar xf ARCHIVE` in another clone puts the runs back, and the script that trained them takes them as done. So a table's seeds
# can be trained one after the other, or in several places. Weights stay behind: leave out runs from which others go on.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "error: bash scripts/keep_runs.sh ARCHIVE FOLDER [FOLDER ...]" >&2
    exit 2
fi
archive=$1
shift
for folder in "$@"; do
    if [ ! -d "$folder" ]; then echo "error: $folder: no such folder" >&2; exit 2; fi
done
find "$@" -type f \( -path '*/eval/*' -o -path '*/progress/*' -o -name metrics.jsonl -o -name config.yaml \
    -o -name finished -o -name compared \) | sort | tar czf "$archive" -T -
du -sh "$archive"
