#!/usr/bin/env bash
# What CI checks: format, lint, types, imports, limits, documents, tests.
#
#   bash scripts/test.sh [arguments for pytest]                 (-m "not slow" leaves the longest tests out)
#   bash scripts/test.sh --fast                                 a minute: nothing is installed, no run is started
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE # else each of the processes that tests start compiles the package anew

fast=
if [ "${1:-}" = --fast ]; then
    fast=yes
    shift
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    if [ ! -x .venv/bin/python ]; then
        echo "test.sh --fast needs .venv; bash scripts/test.sh makes it" >&2
        exit 2
    fi
else
    source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
fi

.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check --quiet .
.venv/bin/lint-imports --no-cache >/dev/null || .venv/bin/lint-imports --no-cache
.venv/bin/python scripts/limits.py >/dev/null
.venv/bin/python scripts/house.py --check
.venv/bin/python scripts/check_docs.py
if [ -n "$fast" ]; then
    exec .venv/bin/python -m pytest -q -n 2 -m "unit and not slow" "$@"
fi
# Half a minute on a clean clone: beside the tests, some of which spend most of their time waiting.
{ .venv/bin/mypy && .venv/bin/mypy --explicit-package-bases tests; } >&2 &
types=$!
for script in scripts/*.sh scripts/*/*.sh .ci/run; do
    bash -n "$script"
done
.venv/bin/shellcheck --external-sources --source-path=SCRIPTDIR scripts/*.sh scripts/*/*.sh .ci/run
code=0
# Three workers on two cores: a third of the time, tests wait for something that uses neither.
.venv/bin/python -m pytest -n 3 "$@" || code=$?
wait "$types" || { echo "test.sh: mypy found something; see above" >&2 && exit 1; }
exit "$code"
