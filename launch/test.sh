#!/usr/bin/env bash
# Check style, spelling and types, then run the tests: the fast tier, or with --all also those marked slow. Other arguments go to
# pytest. First argument instead of --all:
#   --checks          only the checks of style, spelling and types
#   --torch 2.11.0    the fast tier in .venv-torch2.11.0, with that torch and the triton that it requires, installed at the first
#                     call (from PyPI, so with CUDA: 6 to 9 GB on disk)
#   --cuda-host DIR   the CUDA paths without a GPU, on the libraries that benchmarks/without_gpu/stubs/build.sh made in DIR (2.5 GB):
#                     selftest.py, then the kernel tests, which launch everything and compare no values
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --torch ]; then
    export FASTDIT_TORCH=${2:?--torch needs a version, such as 2.11.0} VENV=.venv-torch$2
    shift 2
elif [ "${1:-}" = --cuda-host ]; then
    cuda_host=${2:?--cuda-host needs the folder that benchmarks/without_gpu/stubs/build.sh made}
    shift 2
fi
FASTDIT_BUILD_ISAS=all launch/install.sh
bin=$(cd "${VENV:-.venv}/bin" && pwd)
tier=(-m "not slow")
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # one process per core, each with one thread
if [ -n "${cuda_host:-}" ]; then
    . "$cuda_host/env.sh"
    "$bin/python" -m benchmarks.without_gpu.selftest
    # plain assertions and short tracebacks: the text of a tensor with garbage in it takes gigabytes
    FASTDIT_NO_VALUES=1 exec "$bin/python" -m pytest --assert=plain --tb=short "${tier[@]}" -k "not cpp and not dit_block and not codegen" \
        tests/kernels "$@"
fi
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/clang-format" --dry-run -Werror csrc/* tests/kernels/race_test.cpp
"$bin/codespell"
(
    # a copy that has kernels/ in fastdit/, as in an installation
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    cp -r fastdit pyproject.toml "$copy"
    cp -r kernels "$copy/fastdit/kernels"
    cd "$copy"
    "$bin/basedpyright" --pythonpath "$bin/python"
)
[ "${1:-}" = --checks ] && exit
[ "${1:-}" = --all ] && { tier=(); shift; }
PATH="$bin:$PATH" exec "$bin/python" -m pytest -n $((cores < 8 ? cores : 8)) --dist loadfile --no-loadscope-reorder \
    "${tier[@]}" "$@"
