"""The machine code of every Triton kernel that the ops launch, read without a GPU: registers, memory and access widths.

The public functions run on CPU tensors under a stub driver that names an architecture. Each launch is stopped after Triton has
specialised and compiled it, so the code is what a GPU would run, not that of a hand-written signature. Results of the ops are
meaningless here. Runs only without TRITON_INTERPRET.

    python -m benchmarks.machine_code          # all ops and architectures; updates the table in kernels/README.md too; a minute
    python -m benchmarks.machine_code --arch 90 --ops modulate --csv one.csv
"""

import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks import results_csv
from benchmarks.kernel_cases import CASES
from fastdit.kernels import backend, dispatch, tuning

CSV = "machine_code"
BATCH = 32
RESULTS = results_csv.path_of(CSV, None)
README = Path(__file__).parents[1] / "kernels/README.md"
MARKERS = ("<!-- benchmarks/machine_code.py writes from here -->", "<!-- to here -->")
ARCHITECTURES = (80, 90, 100, 120)
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = 16  # bytes
WARPS_PER_SM = {80: 64, 90: 64, 100: 64, 120: 48}
RESOURCES = {"registers": "REG", "local": "LOCAL", "stack": "STACK"}
SHARED_PER_SM = {80: 164, 90: 228, 100: 228, 120: 100}  # KB


class StubDriver:
    """A driver that answers what Triton asks before it compiles: a target, a device, a stream."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # one device per architecture: Triton caches compiled kernels by device

    def get_current_stream(self, device):
        return 0


class Recorded(NamedTuple):
    """A kernel launch: module.kernel, its grid, and triton's CompiledKernel (asm, metadata, hash)."""

    name: str
    grid: tuple[int, ...]
    compiled: object


class Recorder:
    """Compile every Triton kernel called inside the `with` block for `arch`, and record its launch instead of running it."""

    def __init__(self, arch: int):
        self.arch = arch
        self.launches = []

    def __enter__(self):
        self.before = JITFunction.run, tuning.architecture, dispatch.INTERPRETED
        run = JITFunction.run

        def record(kernel, *args, grid, warmup, **options):
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
            self.launches.append(Recorded(f"{kernel.module.rpartition('.')[2]}.{kernel.__name__.strip('_')}", grid, compiled))
            return compiled

        triton.runtime.driver.set_active(StubDriver(self.arch))
        JITFunction.run = record
        tuning.architecture = lambda device: self.arch
        dispatch.INTERPRETED = True
        self._forget()
        return self

    def __exit__(self, *exception):
        JITFunction.run, tuning.architecture, dispatch.INTERPRETED = self.before
        self._forget()

    def _forget(self):
        tuning.launch_for.cache_clear()
        tuning.chunks.cache_clear()

    def take(self) -> list[Recorded]:
        taken, self.launches = self.launches, []
        return taken


def record_op(recorder: Recorder, op: str, size: int, batch: int) -> dict[str, list[Recorded]]:
    """Return the launches of one forward and one backward of the public function: {"forward": [..], "backward": [..]}."""
    function, inputs = CASES[op].make(size, batch, torch.bfloat16, torch.device("cpu"))
    with backend("triton"):
        outputs = function(*inputs)
    launches = {"forward": recorder.take()}
    outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.requires_grad]
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    if outputs:
        torch.autograd.grad(outputs, wanted, [torch.empty_like(t) for t in outputs])
    return launches | {"backward": recorder.take()}


def code_of(cubin: bytes) -> bytes:
    """Return the machine code of the one kernel in a cubin: its ELF section named .text.<kernel>."""
    table, (entry, count, names) = struct.unpack_from("<Q", cubin, 0x28)[0], struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]  # name, ..., offset, size
    texts = [h for h in headers if cubin.startswith(b".text.", headers[names][4] + h[0])]
    if len(texts) != 1:
        raise ValueError(f"a cubin has {len(texts)} kernels")
    return cubin[texts[0][4] : texts[0][4] + texts[0][5]]


def disassemble(codes: list[bytes], arch: int) -> list[list[str]]:
    """Return the lines of each machine code, one per instruction. All in one call: nvdisasm takes 0.3 s to start."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [BIN / "nvdisasm", "--binary", f"SM{arch}{'a' if arch >= 90 else ''}", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = iter(line for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line))
    listings = [list(islice(lines, len(code) // INSTRUCTION)) for code in codes]
    if any(len(each) * INSTRUCTION != len(code) for each, code in zip(listings, codes, strict=True)) or next(lines, None):
        raise ValueError(f"the disassembly for sm_{arch} has another number of instructions than the code")
    return listings


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers and the bytes of local memory and stack of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BIN / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"\b{key}:(\d+)", text)[1]) for name, key in RESOURCES.items()}


def accesses(listing: list[str]) -> dict[str, int | float]:
    """Return the number of global accesses by width, of spills, barriers and instructions of a disassembled kernel."""
    text, figures, found = "\n".join(listing), {}, Counter()
    for kind, modifiers in re.findall(r"\b(LDG(?:STS)?|STG)\.E([.\w]*)", text):
        bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", modifiers)
        found["store" if kind == "STG" else "load", int(bits[1]) if bits else 32] += 1
    for kind in ("load", "store"):
        by_width = {bits: n for (k, bits), n in found.items() if k == kind}
        figures[f"{kind}s_128"] = by_width.get(128, 0)
        figures[f"{kind}s_narrow"] = sum(by_width.values()) - figures[f"{kind}s_128"]
        moved = sum(bits * n for bits, n in by_width.items())
        figures[f"{kind}_share_128"] = round(128 * figures[f"{kind}s_128"] / moved, 3) if moved else 0.0
    figures["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", text))
    figures["barriers"] = len(re.findall(r"\bBAR\.", text))
    return figures | {"instructions": len(listing)}


def machine_code(cubins: list[bytes], arch: int) -> list[dict[str, int | float]]:
    """Return the figures of the machine code in cubins of one architecture: resources and accesses of each."""
    distinct = list(dict.fromkeys(cubins))
    listings = disassemble([code_of(cubin) for cubin in distinct], arch)
    figures = {cubin: resources(cubin) | accesses(listing) for cubin, listing in zip(distinct, listings, strict=True)}
    return [figures[cubin] for cubin in cubins]


def narrow_offsets(ttgir: str) -> list[str]:
    """Return pointer additions whose 32-bit offset depends on more than constants and column numbers: they would overflow."""
    sources = {}
    for line in ttgir.splitlines():
        if match := re.match(r"\s*(%[\w$#:]+)(?:, %[\w$#]+)* = (\S+)(.*)", line):
            operands = re.findall(r"%[\w$]+", match[3].partition(" loc(")[0])
            sources[match[1].partition(":")[0]] = (match[2], operands)

    def fixed(name: str, seen: frozenset = frozenset()) -> bool:
        if name in seen or name not in sources:
            return False  # a loop variable or a kernel argument
        op, operands = sources[name]
        return op != "tt.get_program_id" and all(fixed(o, seen | {name}) for o in operands)

    additions = re.findall(r"tt\.addptr (%[\w$]+), (%[\w$]+)(?: \{.*?\})? : \S.*?, (?:tensor<[\dx]*)?(i32|i64)\b", ttgir)
    if len(additions) != ttgir.count("tt.addptr "):
        raise ValueError(f"only {len(additions)} of {ttgir.count('tt.addptr ')} pointer additions were understood")
    return [offset for _, offset, width in additions if width == "i32" and not fixed(offset)]


def blocks_per_sm(arch: int, registers: int, warps: int, shared: int) -> int:
    """Return the programs that fit on one multiprocessor at once: registers are allocated per warp in units of 256."""
    per_warp = -(-registers * 32 // 256) * 256
    by_shared = SHARED_PER_SM[arch] * 1024 // (shared + 1024)
    return min(65536 // per_warp // warps, WARPS_PER_SM[arch] // warps, by_shared, 32)


def figures_of(op: str, size: int, arch: int, recorder: Recorder) -> list[tuple[dict, object]]:
    """Return, per launch of the op at BATCH, the figures that need no disassembly and the compiled kernel.

    `recompiled`: whether a batch of BATCH − 1 compiled another kernel.
    """
    rows = []
    first, second = record_op(recorder, op, size, BATCH), record_op(recorder, op, size, BATCH - 1)
    for direction, launches in first.items():
        again = {launch.compiled.hash for launch in second[direction]}
        for launch in launches:
            metadata = launch.compiled.metadata
            figures = {"op": op, "direction": direction, "kernel": launch.name, "size": size, "arch": arch}
            figures |= {"grid": "x".join(map(str, launch.grid)), "warps": metadata.num_warps, "shared": metadata.shared}
            figures["narrow_offsets"] = len(narrow_offsets(launch.compiled.asm["ttgir"]))
            figures["recompiled"] = int(launch.compiled.hash not in again)
            rows.append((figures, launch.compiled))
    return rows


def markdown(rows: list[dict]) -> str:
    """Return the table of kernels/README.md from the rows of the CSV: what each kernel takes on sm_90, and spills on any card."""
    groups = {}
    for row in rows:
        groups.setdefault((row["op"], row["direction"], row["kernel"].partition(".")[2]), []).append(row)
    lines = [
        "| op, direction | kernel | registers (blocks an SM) by size, sm_90 | 128-bit loads, stores | spills |",
        "|---|---|---|---|---|",
    ]
    for (op, direction, kernel), members in groups.items():
        shown = [r for r in members if r["arch"] == "90"]
        sizes = " · ".join(f"{r['size']}: {r['registers']} ({r['blocks_per_sm']})" for r in shown)
        loads, stores = (min(float(r[f"{kind}_share_128"]) for r in shown) for kind in ("load", "store"))
        spills = sum(int(r["spills"]) + int(r["local"]) + int(r["stack"]) for r in members)
        lines.append(f"| {op}, {direction} | {kernel} | {sizes} | {loads:.0%}, {stores:.0%} | {spills} |")
    return "\n".join(lines)


def update_readme(readme: Path, rows: list[dict]) -> None:
    """Replace the text between the two markers of `readme` by the table."""
    before, _, rest = readme.read_text().partition(MARKERS[0])
    readme.write_text(f"{before}{MARKERS[0]}\n{markdown(rows)}\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}")


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, RESULTS)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES, help="architectures (default: all)"
    )
    parser.add_argument("--ops", nargs="+", default=list(CASES), choices=list(CASES), metavar="OP", help="ops (default: all)")
    options = results_csv.parse(parser, words)
    rows = []
    for arch in options.arch:
        compiled = []
        with Recorder(arch) as recorder:
            for op in options.ops:
                for size in CASES[op].sizes:
                    compiled += figures_of(op, size, arch, recorder)
        codes = machine_code([kernel.asm["cubin"] for _, kernel in compiled], arch)
        for (figures, _), code in zip(compiled, codes, strict=True):
            occupancy = blocks_per_sm(arch, code["registers"], figures["warps"], figures["shared"])
            rows.append(figures | code | {"blocks_per_sm": occupancy, "device": "compiled, not run"})
    results_csv.write(options.csv, rows, allow_dirty=options.allow_dirty)
    if options.csv == RESULTS:
        update_readme(README, results_csv.read(RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
