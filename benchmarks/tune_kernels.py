"""Times the launch parameters of the adaLN kernels on this GPU and prints the fastest as lines for TUNED in kernels/tuning.py.

Each candidate's kernels are replayed in a CUDA graph, so that Python's time does not count.
Raise VERSION in kernels/tuning.py when adding a line of a backward: its sums change in the last bit.

    python -m benchmarks.tune_kernels                                   # all ops, widths of the presets; minutes
    python -m benchmarks.tune_kernels --ops modulate --widths 1152 --batch 64
    python -m benchmarks.tune_kernels --dry-run 90                      # no GPU: compile the candidates, print their spills
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from itertools import product

import torch
import triton

from benchmarks.bench_kernels import Replayed, directions, one_stream
from benchmarks.kernel_cases import CASES, WIDTHS
from benchmarks.machine_code import ARCHITECTURES, Recorder, machine_code, record_op
from fastdit.kernels import backend, tuning

OPS = ("modulate", "gated_residual", "gated_residual_modulate")
GAIN = 1.02  # a candidate must beat the default by 2 %; less is noise


def candidates(kernel: str, width: int, arch: int) -> Iterator[tuning.LaunchConfig]:
    """Yield the default, then its neighbours: warps, stages, rows of a forward, blocks of a backward, limits on registers."""
    default = tuning.default_launch(kernel, width, arch)
    seen = [default]
    columns_only = kernel.startswith("gated_residual_") and "modulate" not in kernel
    forward = kernel.endswith("forward")
    warps = {max(1, default.warps // 2), default.warps, min(16, default.warps * 2)}
    stages = (1,) if columns_only else (1, 2, 3)
    rows = {max(1, default.rows // 2), default.rows, default.rows * 2} if forward or columns_only else {default.rows}
    blocks = {default.blocks} if forward else {max(1, default.blocks // 2), default.blocks, default.blocks + 1}
    registers = {None, default.registers}
    for values in product(sorted(warps), stages, sorted(rows), sorted(blocks), registers):
        launch = default._replace(**dict(zip(("warps", "stages", "rows", "blocks", "registers"), values, strict=True)))
        if launch not in seen:
            seen.append(launch)
    yield from seen


def use(kernel: str, width: int, arch: int, launch: tuning.LaunchConfig | None) -> None:
    """Make `launch` the launch of `kernel` (None: the default)."""
    tuning.TUNED.pop((kernel, width, arch), None)
    if launch is not None:
        tuning.TUNED[kernel, width, arch] = launch
    tuning.launch_for.cache_clear()


def milliseconds(op: str, direction: str, width: int, batch: int) -> float:
    """Return the milliseconds of the kernels of one direction, replayed in a CUDA graph."""
    function, inputs = CASES[op].make(width, batch, torch.bfloat16, torch.device("cuda"))
    with backend("triton"), one_stream():
        return statistics.median(Replayed(directions(function, inputs, True)[direction])()) * 1e3


def tune(op: str, direction: str, width: int, batch: int, arch: int) -> tuple[tuning.LaunchConfig, float, float]:
    """Return the best launch, its milliseconds and the default's."""
    kernel, times = f"{op}_{direction}", {}
    for launch in candidates(kernel, width, arch):
        use(kernel, width, arch, launch)
        try:
            times[launch] = milliseconds(op, direction, width, batch)
        except triton.runtime.errors.OutOfResources:
            continue  # more shared memory or registers than the card has
        finally:
            use(kernel, width, arch, None)
    default = next(iter(times))
    best = min(times, key=times.get)
    return (best if times[default] > GAIN * times[best] else default), times[best], times[default]


def dry_run(ops: list[str], widths: list[int], arch: int) -> None:
    """Compile every candidate for `arch` without a GPU and print its registers and spills."""
    cubins = {}
    with Recorder(arch) as recorder:
        for op, width, direction in product(ops, widths, ("forward", "backward")):
            for launch in candidates(f"{op}_{direction}", width, arch):
                use(f"{op}_{direction}", width, arch, launch)
                compiled = record_op(recorder, op, width, 2)[direction][0].compiled
                use(f"{op}_{direction}", width, arch, None)
                cubins[f"{op}_{direction} {width}", launch] = compiled.asm["cubin"]
    for (kernel, launch), code in zip(cubins, machine_code([*cubins.values()], arch), strict=True):
        print(f"{kernel}: {code['registers']} registers, {code['spills']} spills, {launch}")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS, metavar="OP", help="ops (default: all three)")
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS), help="widths (default: those of the presets)")
    parser.add_argument(
        "--batch",
        type=int,
        default=128,
        help="batch size in samples of 256 tokens, more than an L2 cache holds (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run", type=int, choices=ARCHITECTURES, metavar="ARCH", help="only compile for an architecture, without a GPU"
    )
    options = parser.parse_args(words)
    if options.dry_run:
        dry_run(options.ops, options.widths, options.dry_run)
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no GPU to time on: use --dry-run 90 to compile the candidates only")
    arch = tuning.architecture(torch.device("cuda"))
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, batch {options.batch}")
    for op, width, direction in product(options.ops, options.widths, ("forward", "backward")):
        best, fastest, default = tune(op, direction, width, options.batch, arch)
        print(f'    ("{op}_{direction}", {width}, {arch}): {best},  # {fastest:.4f} ms, default {default:.4f} ms', flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
