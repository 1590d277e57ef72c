"""Launch parameters of the Triton kernels: (op, width, architecture) -> a `LaunchConfig`. A table, no autotuner in the hot path.

The defaults are reasoned from machine code compiled without a GPU (registers, so blocks per SM, so bytes in flight) and have
not been timed. `benchmarks/tune_kernels.py` times the alternatives on a GPU and prints lines for TUNED.
Changing the tile, warps, stages, rows or blocks of a kernel that sums changes the last bit of its gradients: raise VERSION then,
and add the new digest of the table to tests/kernels/test_tuning.py.
The limits on registers hold without a spill under triton 3.6, 3.8 and 3.9 on every architecture: run benchmarks.machine_code under
each after a change of a kernel or of a limit.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton

from .dispatch import INTERPRETED

VERSION = 2

# Multiprocessors of the largest card of each architecture: A100, H100, B200, RTX 5090. Constants, not queried: how a sum is cut
# into parts must not depend on the card.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}


class LaunchConfig(NamedTuple):
    """How a kernel is launched. A row of the width is cut into `tile` columns and a masked `tail` (0: none), both powers of two."""

    tile: int
    tail: int = 0
    warps: int = 4
    stages: int = 1  # software pipelining of the loop over rows
    rows: int = 1  # rows of a sample per program of a forward
    registers: int | None = None  # limit per thread (None: the compiler's choice)
    blocks: int = 1  # programs of a backward that fit on one multiprocessor at once


# (op, width, architecture) -> LaunchConfig as measured on a GPU; takes precedence over the defaults below.
TUNED: dict[tuple[str, int, int], LaunchConfig] = {}


@cache
def architecture(device: torch.device) -> int:
    """Return the newest architecture of MULTIPROCESSORS that `device` supports; 90 in the interpreter."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in MULTIPROCESSORS if a <= 10 * major + minor), default=80)


def warps_for(columns: int) -> int:
    """Return the warps, 1 to 16, for eight elements per thread: 128-bit accesses in bf16."""
    return max(1, min(16, columns // 256))


def two_tiles(width: int) -> tuple[int, int]:
    """Return (tile, tail): 1152 = 1024 + 128 and 1088 = 1024 + 64 without dead lanes, any other width as one tile with dead lanes.

    Two tiles only if the tail is small against the tile: a tail of half the tile costs more in reductions than it saves in lanes.
    """
    tile = triton.next_power_of_2(width)
    half = tile // 2
    tail = triton.next_power_of_2(max(1, width - half))
    return (half, tail) if half >= 1024 and tail * 4 <= half else (tile, 0)


def column_tile(width: int) -> int:
    """Return the columns of a tile of a kernel that reduces no row: the largest power of two up to 512 that divides the width, if
    it is 64 or more; else a tile with dead lanes."""
    divisor = min(512, width & -width)
    return divisor if divisor >= 64 else min(512, triton.next_power_of_2(width))


def default_launch(op: str, width: int, arch: int) -> LaunchConfig:
    """Return the default for one kernel. `blocks` is what its registers allow per SM on sm_90 (results/machine_code.csv).

    The speed of a backward depends on bytes in flight, blocks x loaded tensors x row bytes x stages: an H100 needs about 36 KB per
    SM. Raises ValueError for an unknown kernel.
    """
    tile, tail = two_tiles(width)
    warps = warps_for(tile)
    stages = 2 if tile + tail <= 1024 or arch == 100 else 1  # short rows, and the highest bandwidth: a second row in flight
    narrow = tile <= 1024  # eight elements per thread on at most four warps: these limits on registers hold without a spill
    half_tail = tail == 64  # 1088: half of the threads hold two tiles, and no spill under triton 3.6 to 3.9 is harder to come by
    if op == "modulate_forward":
        # One tensor to load: without the second row 23 KB at 1152. Left alone, triton 3.8 aims at 48 registers there and spills.
        return LaunchConfig(tile, tail, warps, stages=2, rows=4, registers=64 if tail else None)
    if op == "gated_residual_modulate_forward":
        # 1088 on sm_90: left alone, triton 3.8 aims at 64 registers and spills where there is a bias.
        return LaunchConfig(tile, tail, warps, stages, rows=4, registers=72 if half_tail and arch == 90 else None)
    if op == "modulate_backward":
        # 1088 on sm_100: 72 registers without a limit too, and with it triton 3.6 spills.
        limit = 72 if narrow and not (half_tail and arch == 100) else None
        return LaunchConfig(tile, tail, warps, stages, registers=limit, blocks=max(1, 28 // max(2, warps)))
    if op == "gated_residual_modulate_backward":
        # Left alone, the compiler takes 128 registers for the pipelined loop (4 blocks at 768), and 96 to 127 at 1088.
        if half_tail and arch in (90, 100):  # triton 3.6 spills under a limit of 96, which is a fifth block
            return LaunchConfig(tile, tail, warps, stages, blocks=4)
        return LaunchConfig(tile, tail, warps, stages, registers=96 if narrow else None, blocks=max(1, 20 // max(2, warps)))
    if op in ("gated_residual_forward", "gated_residual_backward"):
        columns = column_tile(width)
        return LaunchConfig(columns, 0, 4, rows=2048 // columns, blocks=7)
    raise ValueError(f"{op}: kernels/tuning.py has no launch parameters for this kernel: add it to default_launch")


@cache
def launch_for(op: str, width: int, device: torch.device) -> LaunchConfig:
    """Return the launch parameters of kernel `op` at `width` on `device`."""
    arch = architecture(device)
    return TUNED.get((op, width, arch)) or default_launch(op, width, arch)


@cache
def chunks(batch: int, tokens: int, blocks: int, device: torch.device, least: int = 8) -> tuple[int, int]:
    """Return (parts, rows): a backward cuts the tokens of a sample into `parts` of `rows` tokens, one program each.

    The programs make one full wave and never a small second one; a part has at least `least` rows. (At 8 rows three fp32 sums are
    an eighth of the backward's bytes, but then they are few and stay in the L2 cache.) If more samples are given than fit at once:
    four waves, so that the last one costs little, or one part. batch: programs that one part of every sample needs.
    """
    slots = MULTIPROCESSORS[architecture(device)] * blocks
    parts = slots // batch if batch <= slots else -(-4 * slots // batch)
    parts = max(1, min(parts, tokens // least))
    rows = -(-tokens // parts)
    return -(-tokens // rows), rows


def check_width(op: str, width: int) -> None:
    """Raise ValueError if a row does not fit into the registers of one program."""
    if width > 8192:
        raise ValueError(
            f"{op}: width {width} is over 8192, the widest row of the Triton kernels: use kernels.backend('reference')"
        )
