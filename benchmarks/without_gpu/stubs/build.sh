#!/usr/bin/env bash
# build.sh DIR [WHEELDIR]: makes DIR, about 2.5 GB and not inside of a repository, with the CUDA build of torch and triton for the
# python3 that is running (PYTHON=... names another) and stubs of the CUDA libraries. WHEELDIR holds the wheels; without it, pip downloads them.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$1"
dir=$(cd "$1" && pwd)
wheels=${2:-$dir/wheels}
if git -C "$dir" rev-parse --show-toplevel >/dev/null 2>&1; then
    echo "$dir lies in a repository" >&2
    exit 2
fi
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')

if [ $# -lt 2 ]; then
    for wheel in torch==2.11.0 triton==3.6.0 nvidia-cuda-runtime==13.0.96; do
        "$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --dest "$wheels" "$wheel"
    done
fi
unpack() { # WHEEL FOLDER [MEMBERS]
    [ -f "$1" ] || { echo "no wheel $1" >&2; exit 2; }
    "$python" - "$@" <<'PY'
import sys, zipfile
wheel, folder, *prefixes = sys.argv[1:]
with zipfile.ZipFile(wheel) as z:
    names = [n for n in z.namelist() if not prefixes or n.startswith(tuple(prefixes))]
    z.extractall(folder, names)
    for n in names:  # zipfile drops modes: ptxas and its like have to be executable
        mode = z.getinfo(n).external_attr >> 16 & 0o777
        if mode and not n.endswith("/"):
            (__import__("pathlib").Path(folder) / n).chmod(mode | 0o600)
PY
}
rm -rf "$dir/site" "$dir/lib" "$dir/headers"
unpack "$(ls "$wheels"/torch-2.11.0*-"$tag"-*.whl | head -1)" "$dir/site"
unpack "$(ls "$wheels"/triton-3.6.0*-"$tag"-*.whl | head -1)" "$dir/site"
unpack "$(ls "$wheels"/nvidia_cuda_runtime-13*.whl | head -1)" "$dir/headers" nvidia/cu13/include/
"$python" "$here/stubs.py" "$dir/site/torch/lib" "$dir/headers/nvidia/cu13/include" "$dir/lib"

cat > "$dir/env.sh" <<'ENV'
# source env.sh: torch and triton of this folder on one H100 that is not there. Caches stay in the folder.
gpustub_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export GPUSTUB_LIB=$gpustub_dir/lib
export LD_LIBRARY_PATH=$gpustub_dir/lib:$gpustub_dir/site/torch/lib
export TRITON_LIBCUDA_PATH=$gpustub_dir/lib
export PYTHONPATH=$gpustub_dir/site
export PYTORCH_ALLOC_CONF=expandable_segments:False
export TRITON_CACHE_DIR=$gpustub_dir/cache/triton TORCHINDUCTOR_CACHE_DIR=$gpustub_dir/cache/inductor TORCHINDUCTOR_COMPILE_THREADS=1
export OMP_NUM_THREADS=1
ENV
# shellcheck disable=SC1091
. "$dir/env.sh"
du -sh "$dir" | sed 's|\t.*| in all|'
"$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
