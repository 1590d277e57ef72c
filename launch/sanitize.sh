#!/usr/bin/env bash
# The C++ kernels under sanitizers: the op tests with address and undefined-behaviour checks, then tests/kernels/race_test.cpp with
# the thread checks, for every instruction set of this machine. Builds in a temporary copy; needs g++ and an installed fastdit
# (.venv or $VENV). Some 3 minutes on 2 cores. They do not see what AMX's tile instructions load and store; the same code on plain
# vectors is what they check of that.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(cd "${VENV:-.venv}/bin" && pwd)/python
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r csrc kernels fastdit tests benchmarks setup.py pyproject.toml README.md "$copy"
cd "$copy"
rm -f kernels/_cpp*.so
ln -s ../kernels fastdit/kernels  # the copy is imported as it lies, before the editable install
export PYTHONPATH=$copy

declare -A flags=([baseline]="" [avx2]="-mavx2 -mfma -mf16c" [avx512]="-mavx512f -mavx512bf16 -mavx2 -mfma -mf16c"
    [amx]="-mavx512f -mavx512bf16 -mavx2 -mfma -mf16c -mamx-tile -mamx-bf16")
sets=(baseline)
grep -qw avx2 /proc/cpuinfo && sets+=(avx2)
grep -qw avx512_bf16 /proc/cpuinfo && sets+=(avx512)
grep -qw amx_bf16 /proc/cpuinfo && sets+=(amx)

for isa in "${sets[@]}"; do
    echo "threads, $isa"
    # shellcheck disable=SC2046,SC2086
    g++ -std=c++20 -O1 -g -fsanitize=thread -Wno-psabi ${flags[$isa]} -DFASTDIT_ISA=$isa \
        $(ls csrc/*.cpp | grep -v ops.cpp) tests/kernels/race_test.cpp -o race_test
    TSAN_OPTIONS=halt_on_error=1 ./race_test
done

export CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
FASTDIT_BUILD_EXT=1 LDFLAGS=$CFLAGS "$python" setup.py -q build_ext --inplace
# torch is not built for them, and Python leaks by design
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0
"$python" -c "from fastdit.kernels import library; assert str(library.EXTENSION).startswith('$copy'), library.EXTENSION"
for isa in "${sets[@]}"; do
    echo "addresses and undefined behaviour, $isa"
    # what a compiler traces runs no kernel of its own, and the other sets have their turn in this loop
    FASTDIT_ISA=$isa "$python" -m pytest -q -p no:cacheprovider -m "not slow" \
        -k "cpp and not compiles and not opcheck and not instruction_sets" tests/kernels
done
