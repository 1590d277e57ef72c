#!/usr/bin/env bash
# From a fresh clone to a trained model and its samples: installs into .venv (or $VENV), trains a small DiT on real handwritten
# digits through the deepspeed launcher, draws a 10 x 10 grid (one row per class) and evaluates 200 samples.
# A second call finds everything done and only draws.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh
bin=$(cd "${VENV:-.venv}/bin" && pwd)
export PATH="$bin:$PATH"

global_batch=32
gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    ranks=1  # this model is far too small for more
else
    # one rank a core beats one rank with many threads: small operations do not split well
    cores=$(nproc)
    ranks=$((cores >= 4 ? 4 : cores >= 2 ? 2 : 1))
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
fi
run=runs/quickstart
deepspeed -q --no_local_rank --num_gpus "$ranks" --module fastdit.cli train launch/configs/quickstart.yaml train.batch_size=$((global_batch / ranks))
unset OMP_NUM_THREADS
fastdit sample --checkpoint "$run" --per-class 20 --seed-per-sample --out "$run/grid.png" --npz "$run/samples.npz"
fastdit evaluate "$run/samples.npz" --features digits --out "$run/evaluation.json"
echo "ten digits of each class, one row per class: $PWD/$run/grid.png"
