# Sourced by the other scripts: make_environment DIR REQUIREMENTS creates or reuses a virtual environment and installs into it.

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.10 or newer is needed; set PYTHON to one" >&2
    return 2
}

make_environment() {
    local directory=$1 requirements=$2 python stamp
    if [ ! -x "$directory/bin/python" ]; then
        python=$(find_python) || return
        echo "== creating $directory with $("$python" --version)"
        "$python" -m venv "$directory"
    fi
    stamp="$directory/installed-$(basename "$requirements" .txt)-$(cat requirements*.txt | sha256sum | cut -c1-16)"
    if [ ! -e "$stamp" ]; then
        echo "== installing $requirements into $directory (a few minutes the first time)"
        "$directory/bin/python" -m pip install --quiet --quiet --disable-pip-version-check -r "$requirements" || return
        touch "$stamp"
    fi
}

whole() { # LOG: whether the training that wrote it came to its end; one that a signal stops ends without an error, too
    tail -n 5 "$1" | grep -q "finished: [0-9]* steps" || { echo "error: stopped before its end, see $1; the same command goes on" >&2; return 1; }
}
