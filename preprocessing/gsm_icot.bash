#!/usr/bin/env bash
# GSM8K-Aug (arXiv 2405.14838), fetched and turned into gsm_{train,valid,test}.json: bash preprocessing/gsm_icot.bash [DIRECTORY]
# DIRECTORY: default data/ of this repository. A rerun fetches only what is missing or wrong and goes on with a partial file.
# GSM_RAW_URL, GSM_MEDIA_URL: other places with {valid,test}.txt and train.txt (file:// works). PYTHON: the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/environment.sh"

source_path=da03/Internalize_CoT_Step_by_Step/e06a32ee5e4cd117171daeb4755d2a97ece62761/data/gsm8k
raw_url=${GSM_RAW_URL:-https://raw.githubusercontent.com/$source_path}
# In the raw view train.txt is only a pointer to a large file; this host serves the content.
media_url=${GSM_MEDIA_URL:-https://media.githubusercontent.com/media/$source_path}
# split, lines, bytes, sha256; train's are those of the pointer, "-" is not known.
facts=${GSM_FACTS:-"
valid 500 143419 04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87
test 1319 - -
train 385620 87805358 0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c"}

fail() {
    echo "gsm_icot.bash: error: $*" >&2
    exit 2
}

sha256() { { sha256sum "$1" 2>/dev/null || shasum -a 256 "$1"; } | cut -d' ' -f1; }

# What is wrong with FILE, for one line; nothing where it is what was asked for.
problem_of() {
    local file=$1 lines=$2 bytes=$3 sum=$4 start found
    start=$(head -c 200 "$file" | tr -d '\0' | tr -d '[:space:]')
    found=$(($(wc -c <"$file")))
    case $start in
        versionhttps://git-lfs*) echo "a Git LFS pointer instead of the data: the address must serve large files, as media.githubusercontent.com does (GSM_MEDIA_URL)" ;;
        "<"*) echo "an HTML page instead of the data: open the address in a browser, sign in to the network or wait for the limit to end, then run this again" ;;
        *)
            if [ "$bytes" != - ] && [ "$found" -ne "$bytes" ]; then
                echo "$found bytes instead of $bytes: run this again"
            elif [ "$(($(wc -l <"$file")))" -ne "$lines" ]; then
                echo "$(($(wc -l <"$file"))) lines instead of $lines: run this again"
            elif [ "$sum" != - ] && [ "$(sha256 "$file")" != "$sum" ]; then
                echo "its sha256 is not $sum: run this again; if it stays, the place serves another file"
            fi
            ;;
    esac
}

# Fetches URL into PART, from where an earlier try ended.
fetch() {
    local url=$1 part=$2 code=0 said
    said=$(curl --fail --location --silent --show-error --connect-timeout 30 --speed-limit 1 --speed-time 60 --retry 3 \
        --continue-at - --output "$part" "$url" 2>&1) || code=$?
    # 33: the server knows no byte ranges; 416: it has none after this part.
    if [ -s "$part" ] && { [ "$code" -eq 33 ] || [[ $said == *416* ]]; }; then
        rm -f "$part"
        fetch "$url" "$part"
    elif [ "$code" -ne 0 ]; then
        fail "$url: ${said##*$'\n'} (curl exit code $code); run this again, it goes on from what came"
    fi
}

obtain() {
    local file=$1 url=$2 problem old="" part=$1.part
    shift 2
    if [ -f "$file" ] && [ -z "$(problem_of "$file" "$@")" ]; then
        echo "== $file is there"
        return
    fi
    if [ ! -f "$part" ] || [ -n "$(problem_of "$part" "$@")" ]; then
        echo "== $file from $url"
        [ ! -s "$part" ] || old=yes
        fetch "$url" "$part"
    fi
    [ -f "$part" ] || fail "$url: nothing in it"
    problem=$(problem_of "$part" "$@")
    if [ -n "$problem" ]; then
        rm -f "$part" # to go on with it would add good bytes to bad ones
        if [ -n "$old" ]; then # the fault may lie in what was there before
            obtain "$file" "$url" "$@"
            return
        fi
        fail "$url gave $problem"
    fi
    mv "$part" "$file"
}

[ $# -le 1 ] && [[ ${1:-} != -* ]] || fail "expected at most one argument, the directory to write to"
directory=${1:-$root/data}
command -v curl >/dev/null || fail "curl is not installed"
python=$root/.venv/bin/python
if [ -n "${PYTHON:-}" ] || [ ! -x "$python" ]; then python=$(find_python); fi
mkdir -p "$directory" 2>/dev/null && [ -w "$directory" ] || fail "cannot write to $directory"

while read -r split lines bytes sum; do
    [ -n "$split" ] || continue
    url=$raw_url
    [ "$split" != train ] || url=$media_url
    obtain "$directory/gsm_$split.txt" "$url/$split.txt" "$lines" "$bytes" "$sum"
    "$python" "$root/preprocessing/gsm_icot.py" "$directory/gsm_$split.txt" "$directory/gsm_$split.json"
done <<<"$facts"
