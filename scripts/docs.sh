#!/usr/bin/env bash
# Turns the documents into a site: builds site/, or serves it while you write.
#
#   bash scripts/docs.sh                    # checks the documents, then builds site/; warnings are errors
#   bash scripts/docs.sh serve [address]    # serves http://127.0.0.1:8000/, and updates it after every change
#
# Makes .venv-docs from docs/requirements.txt if it is missing or out of date. PYTHON names the interpreter for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-build} in
    build | serve) ;;
    *) echo "docs.sh: unknown argument $1; use none, or serve" >&2 && exit 2 ;;
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
python=.venv/bin/python # if it is there, commands and settings are checked, too
[ -x "$python" ] || python=.venv-docs/bin/python
"$python" scripts/check_docs.py
.venv-docs/bin/mkdocs build --strict --quiet --site-dir site
echo "site/index.html"
