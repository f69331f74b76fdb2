#!/usr/bin/env bash
# Runs the test suite with the oldest versions of the libraries that train_loop works with, and with the newest.
#
#   bash scripts/oldest.sh [oldest] [newest] [-- arguments for pytest]      (default: both)
#
# Makes .venv-oldest (constraints-oldest.txt) and .venv-newest (whatever is newest today). Each takes several gigabytes,
# because PyPI's torch includes CUDA's libraries; it also runs on a CPU. PYTHON names the interpreter for them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        oldest | newest) which+=("$1") ;;
        *) echo "oldest.sh: unknown argument $1; use oldest, newest, or both, and put pytest's arguments after --" >&2 && exit 2 ;;
    esac
    shift
done
[ $# -gt 0 ] && shift
[ ${#which[@]} -gt 0 ] || which=(oldest newest)

for each in "${which[@]}"; do
    folder=.venv-$each
    "${PYTHON:-python3}" -m venv --clear "$folder"
    constraint=(--upgrade)
    [ "$each" = newest ] || constraint=(--constraint constraints-oldest.txt)
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${constraint[@]}" --editable '.[test]'
done

failed=0
for each in "${which[@]}"; do
    echo "== $each =="
    ".venv-$each/bin/python" -c 'from train_loop import versions
print(*(f"{name} {versions.version(name)}" for name in versions.WORK), sep=", ")'
    ".venv-$each/bin/python" -m pytest "$@" || failed=1
done
exit $failed
