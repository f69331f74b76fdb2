# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh. Makes .venv in the repository if it is missing or out of date.
#
# PYTHON names the interpreter for it (python3.11 or newer). constraints.txt lists the packages.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

find_python() {
    local name
    for name in "${PYTHON:-}" python3.11 python3 python; do
        if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return 0
        fi
    done
    echo "train_loop needs Python 3.11 or newer; name one with PYTHON=... " >&2
    return 1
}

# .venv is up to date if it was made from the current versions of these two files.
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/made-from 2>/dev/null)" != "$wanted" ]; then
    python=$(find_python) || exit 1
    echo "making .venv with $("$python" --version) (once; a minute or two)" >&2
    "$python" -m venv --clear .venv || exit 1
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable '.[test]' >&2 || exit 1
    echo "$wanted" >.venv/made-from
fi
