#!/usr/bin/env bash
# The tests: the fast tier, or with --all also those marked slow. Other arguments go to pytest. First argument instead of --all:
#   --torch 2.11.0    the fast tier in .venv-torch2.11.0, with that torch and the triton that it asks for, installed at the first
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
launch/install.sh
bin=$(cd "${VENV:-.venv}/bin" && pwd)
tier=(-m "not slow")
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # a process a core, each of one thread
if [ -n "${cuda_host:-}" ]; then
    . "$cuda_host/env.sh"
    "$bin/python" -m benchmarks.without_gpu.selftest
    # plain assertions, short tracebacks: the text of a tensor whose values are garbage takes gigabytes
    FASTDIT_NO_VALUES=1 exec "$bin/python" -m pytest --assert=plain --tb=short "${tier[@]}" -k "not cpp and not dit_block and not codegen" \
        tests/kernels "$@"
fi
[ "${1:-}" = --all ] && { tier=(); shift; }
"$bin/ruff" check .
"$bin/ruff" format --check .
PATH="$bin:$PATH" exec "$bin/python" -m pytest -n $((cores < 8 ? cores : 8)) --dist loadfile "${tier[@]}" "$@"
