#!/usr/bin/env bash
# Runs everything that CI checks: format, lint, types, tests.
#
#   bash scripts/test.sh [arguments for pytest]                 (-m "not slow" leaves the longest tests out)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
for script in scripts/*.sh scripts/*/*.sh .ci/run; do
    bash -n "$script"
done
.venv/bin/shellcheck --external-sources --source-path=SCRIPTDIR scripts/*.sh scripts/*/*.sh .ci/run
.venv/bin/python -m pytest "$@"
