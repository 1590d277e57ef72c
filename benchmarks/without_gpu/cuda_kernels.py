"""Kernels, launches and bytes of a DiT block under torch.compile for an H100, derived without one (see without_gpu/README.md).

    python -m benchmarks.without_gpu.cuda_kernels [--presets S/2 B/2 XL/2] [--kernels]

Dynamo, AOTAutograd and Inductor's lowering, scheduling and code generation are real, on tensors of device "cuda" without memory
(FakeTensorMode); nothing is executed. One row per preset, version and direction: launches by kind, MB that must move at least once
(`memory_bound_mb`: all but matmuls and attention), MB saved for the backward, column sums (reductions over all tokens that are
kernels of Inductor's, two for most bias gradients), graphs that Dynamo made of the blocks. Takes 3 minutes.
"""

import sys
from collections import Counter

from benchmarks.without_gpu import cuda_shim  # noqa: F401 (before torch)

# isort: split

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import results_csv
from benchmarks.without_gpu.inductor_graphs import Compiler, Graph, Kernel
from benchmarks.without_gpu.pretend_cuda import pretend

CSV = "cuda_kernels"
DEPTH = 2  # blocks of the models: the last block gets a graph of its own
VERSIONS = {
    "fused": "fastdit, fused ops, blocks compiled",
    "reference": "fastdit, reference ops, blocks compiled: Inductor's own fusion",
    "base": "eager reference, blocks compiled",
}
KINDS = {
    "fused op": "fused_ops",
    "triton": "inductor",
    "copy": "copies",
    "other": "others",
    "gemm": "gemms",
    "attention": "attention",
}


def on_card(model: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Return the model with its parameters (in a dtype) and tables on "cuda"; fake ones cannot be cast or moved in place."""
    for module in model.modules():
        for tensors, options in ((module._parameters, {"dtype": dtype}), (module._buffers, {})):
            for name, t in tensors.items():
                if t is not None:
                    new = torch.empty_like(t, device="cuda", **options)
                    tensors[name] = torch.nn.Parameter(new) if tensors is module._parameters else new
    return model


def fastdit_model(preset: str, batch: int, backend: Compiler):
    """Return fastdit's bf16 model with blocks compiled as in engine.initialize, and a function that returns a step's loss."""
    from fastdit import flow
    from fastdit.config import FlowConfig, ModelConfig
    from fastdit.model import DiT
    from fastdit.presets import PRESETS

    options = PRESETS[preset] | {"depth": DEPTH}
    config = ModelConfig(preset=preset, in_channels=4, input_size=32, num_classes=1000, **options)
    model = on_card(DiT(config).train(), torch.bfloat16)
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    x0, labels = torch.empty(batch, 4, 32, 32, device="cuda"), torch.zeros(batch, dtype=torch.int64, device="cuda")
    ids = flow.sample_ids(0, 0, batch, torch.device("cuda", 0))
    return model, lambda: flow.losses(model, x0, labels, ids, FlowConfig(), seed=0, null=config.num_classes).total.mean()


def base_model(preset: str, batch: int, backend: Compiler):
    """Return the same of the eager reference: bf16 autocast over fp32 weights."""
    from benchmarks import eager_reference
    from fastdit.presets import PRESETS

    p = PRESETS[preset]
    config = eager_reference.comparable(p["width"], DEPTH, p["heads"], p["hidden"], p.get("class_width"))
    model = on_card(eager_reference.EagerDiT(config).train())
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    x0, labels = torch.empty(batch, 4, 32, 32, device="cuda"), torch.zeros(batch, dtype=torch.int64, device="cuda")
    noise, t = torch.empty_like(x0), torch.empty(batch, device="cuda")

    def loss() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            t4 = t[:, None, None, None]
            return F.mse_loss(model((1 - t4) * x0 + t4 * noise, t, labels), noise - x0)

    return model, loss


def compiled(version: str, preset: str, batch: int) -> Compiler:
    """Return what Inductor made of two steps of a version; a recompilation in the second would be further graphs."""
    from fastdit.kernels import backend

    torch._dynamo.reset()
    compiler = Compiler(batch)
    make = base_model if version == "base" else fastdit_model
    with FakeTensorMode(allow_non_fake_inputs=True), backend("reference" if version == "reference" else "triton"):
        model, loss_of = make(preset, batch, compiler)
        for _ in range(2):
            loss_of().backward()
            model.zero_grad()
    return compiler


def row(kernels: list[Kernel]) -> dict[str, str]:
    """Return the columns of one direction of a block."""
    launches, sizes = Counter(), Counter()
    for k in kernels:
        launches[k.kind] += k.launches
        sizes[k.kind] += k.bytes
    kinds = {f"{name}_launches": str(launches[kind]) for kind, name in KINDS.items()}
    bound = sum(sizes[kind] for kind in KINDS if kind not in ("gemm", "attention"))
    return {
        "launches": str(sum(n for kind, n in launches.items() if kind not in ("gemm", "attention"))), **kinds,
        "memory_bound_mb": f"{bound / 1e6:.1f}", "gemm_attention_mb": f"{(sizes['gemm'] + sizes['attention']) / 1e6:.1f}",
        "column_sums": str(sum(k.column_sum for k in kernels)),
    }  # fmt: skip


def rows_of(preset: str, version: str, batch: int, compiler: Compiler) -> list[dict[str, str]]:
    """Return one row per direction of the first block."""
    rows = []
    for direction in ("forward", "backward"):
        graph: Graph = next(g for g in compiler.graphs if g.backward is (direction == "backward"))
        key = {"preset": preset, "version": version, "batch": str(batch), "direction": direction}
        saved = {"saved_mb": f"{graph.saved / 1e6:.1f}" if graph.backward else "", "graphs": str(compiler.dynamo_graphs)}
        columns = row(graph.kernels)
        if not graph.backward:
            columns["column_sums"] = ""  # a norm's statistics look alike
        rows.append(key | columns | saved)
    return rows


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV, None))
    parser.add_argument(
        "--presets", nargs="+", default=["S/2", "B/2", "XL/2"], metavar="PRESET", help="model presets (default: %(default)s)"
    )
    parser.add_argument(
        "--versions", nargs="+", default=list(VERSIONS), choices=list(VERSIONS), metavar="VERSION",
        help=f"what is compiled, of {', '.join(VERSIONS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=64, help="images per step (default: %(default)s)")
    parser.add_argument("--kernels", action="store_true", help="print every kernel")
    options = results_csv.parse(parser, words)
    pretend()
    rows = []
    for preset in options.presets:
        for version in options.versions:
            compiler = compiled(version, preset, options.batch)
            rows += rows_of(preset, version, options.batch, compiler)
            print(results_csv.table(rows[-2:], tuple(rows[-1])), flush=True)
            for g in compiler.graphs if options.kernels else ():
                print("backward" if g.backward else "forward")
                for k in g.kernels:
                    print(f"  {k.bytes / 1e6:9.2f} MB  {k.kind:10} {'column sum ' if k.column_sum else ''}{k.name}")
    device = f"{torch.cuda.get_device_name()}: compiled for it, not run"
    results_csv.write(options.csv, [r | {"device": device} for r in rows], torch.device("cuda", 0), options.allow_dirty)
    print(f"rows: {options.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
