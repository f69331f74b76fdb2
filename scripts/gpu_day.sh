#!/usr/bin/env bash
# Checks, on this machine's GPU and in eight minutes, what can't be checked without a GPU, and measures the rest.
#
#   bash scripts/gpu_day.sh [--cpu] [--parts PART ...] [--python P] [--output DIR]          (see --help)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

complain() {
    echo "gpu_day: $1" >&2
    exit 2
}

arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --python)
            [ $# -gt 1 ] || complain "--python: name an interpreter"
            python=$2
            shift 2
            ;;
        --python=*)
            python=${1#*=}
            shift
            ;;
        *)
            arguments+=("$1")
            shift
            ;;
    esac
done

command -v "$python" >/dev/null || complain "--python $python: not found; name a Python that has torch"
[ "$("$python" -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)" = True ] ||
    complain "--python $python: is not Python 3.11 or newer"
exec "$python" "$root/scripts/gpu_day/day.py" ${arguments[@]+"${arguments[@]}"}
