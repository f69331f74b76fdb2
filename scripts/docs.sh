#!/usr/bin/env bash
# The documents as a site: builds site/, or serves it while you write.
#
#   bash scripts/docs.sh                    # checks the documents, then builds site/; a warning is an error
#   bash scripts/docs.sh serve [address]    # http://127.0.0.1:8000/, renewed at every change
#
# Makes .venv-docs from docs/requirements.txt when it is missing or stale. PYTHON names the interpreter to make it with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-build} in
    build | serve) ;;
    *) echo "docs.sh: unknown: $1; say nothing, or serve" >&2 && exit 2 ;;
esac

wanted=$(cksum <docs/requirements.txt)
if [ ! -x .venv-docs/bin/mkdocs ] || [ "$(cat .venv-docs/made-from 2>/dev/null)" != "$wanted" ]; then
    echo "making .venv-docs (once; less than a minute)" >&2
    "${PYTHON:-python3}" -m venv --clear .venv-docs
    .venv-docs/bin/python -m pip install -qq --disable-pip-version-check --requirement docs/requirements.txt >&2
    echo "$wanted" >.venv-docs/made-from
fi

export NO_MKDOCS_2_WARNING=1
if [ "${1:-build}" = serve ]; then
    exec .venv-docs/bin/mkdocs serve --quiet --dev-addr "${2:-127.0.0.1:8000}"
fi
python=.venv/bin/python # which can also say which commands and settings there are
[ -x "$python" ] || python=.venv-docs/bin/python
"$python" scripts/check_docs.py
.venv-docs/bin/mkdocs build --strict --quiet --site-dir site
echo "site/index.html"
