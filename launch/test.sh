#!/usr/bin/env bash
# The tests: the fast tier, or with --all also those marked slow. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh
bin=$(cd "${VENV:-.venv}/bin" && pwd)
tier=(-m "not slow")
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # a process a core, each of one thread
[ "${1:-}" = --all ] && { tier=(); shift; }
"$bin/ruff" check .
"$bin/ruff" format --check .
PATH="$bin:$PATH" exec "$bin/python" -m pytest -n $((cores < 8 ? cores : 8)) --dist loadfile "${tier[@]}" "$@"
