#!/usr/bin/env bash
# Compress what stands behind a published table, so that it can be committed: bash scripts/keep_records.sh RESULTS KEPT
# For instance: bash scripts/keep_records.sh results/quickstart results/kept/quickstart
# Takes summaries, metrics, predictions and the answers of each question; tables and figures can be made from these.
set -euo pipefail
if [ $# -ne 2 ] || [ ! -d "$1" ]; then
    echo "error: bash scripts/keep_records.sh RESULTS KEPT: RESULTS is a folder that an experiment wrote" >&2
    exit 2
fi
find "$1" -type f \( -name '*.json' -o -name '*.jsonl' \) | sort | while IFS= read -r file; do
    folder=$(dirname "$file")
    case $(basename "$file") in
        summary_* | *.jsonl) ;;
        *) if [ -d "$folder/progress" ]; then continue; fi ;; # the answers again, by noise type: progress/ has them
    esac
    kept=$2/${file#"$1"/}.gz
    mkdir -p "$(dirname "$kept")"
    gzip -9nc "$file" > "$kept"
done
du -sh "$2"
