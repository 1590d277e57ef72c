#!/usr/bin/env bash
# Train on one node or on several: launch/train.sh [--restarts N] CONFIG.yaml [section.key=value …]
# Paths are relative to where you stand.
#   GPUS=N          ranks of this node (default: all its GPUs, or those of CUDA_VISIBLE_DEVICES; 1 without any)
#   HOSTFILE=FILE   several nodes, as DeepSpeed's launcher wants them (one line "host slots=8" per node; ssh without a password); environment
#                   variables for them go into .deepspeed_env, as NAME=value lines
#   MASTER_PORT=N   default 29500: another one for a second run on the same node
# --restarts N: when the run fails, start it again from its newest whole checkpoint, N times at most. Not after bad input (exit code 2),
# SIGINT or SIGTERM.
set -uo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "$repository" && cd "${VENV:-.venv}/bin" && pwd) || { echo "run launch/install.sh first" >&2; exit 2; }
export PATH="$bin:$PATH"
restarts=0
[ "${1:-}" = --restarts ] && { restarts=${2:?--restarts needs a number}; shift 2; }
complain() { echo "train.sh: $1" >&2; exit 2; }
[ $# -gt 0 ] || { sed -n '2,9s/^# \?//p' "$0"; exit 2; }

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
ranks=${GPUS:-$((gpus > 0 ? gpus : 1))}
port=${MASTER_PORT:-29500}
command=(deepspeed -q --no_local_rank --master_port "$port")
if [ -n "${HOSTFILE:-}" ]; then
    [ -f "$HOSTFILE" ] || complain "HOSTFILE=$HOSTFILE is not there: DeepSpeed would train on this node only"
    command+=(--hostfile "$HOSTFILE")
else
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && complain "MASTER_PORT=$port is in use on this node: set MASTER_PORT to another port"
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [ "$gpus" -gt 0 ]; then
        # with --num_gpus, DeepSpeed drops the variable and takes the node's first GPUs
        [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]] ||
            complain "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES must be numbers such as 4,5: DeepSpeed's launcher takes no other names"
        IFS=, read -ra chosen <<<"$CUDA_VISIBLE_DEVICES"
        [ "$ranks" -le "${#chosen[@]}" ] || complain "GPUS=$ranks is more than the GPUs of CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
        command+=(--include "localhost:$(IFS=,; echo "${chosen[*]:0:ranks}")")
    else
        command+=(--num_gpus "$ranks")
    fi
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}  # the launcher gives every rank all cores
fi

stopped=
trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM INT
for ((attempt = 0; ; attempt++)); do
    "${command[@]}" --module fastdit.cli train "$@" &
    child=$!
    wait "$child"; code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done  # a signal ends `wait`, not the run
    [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ -n "$stopped" ] || [ "$attempt" -ge "$restarts" ] && exit "$code"
    echo "train.sh: exit code $code; restart $((attempt + 1)) of $restarts" >&2
done
