"""Reads what Inductor makes of a graph for CUDA, without running it: kernels, launches and bytes.

Bytes are what a kernel must read and write at least once: for a Triton kernel the elements of inputs and outputs that its index
expressions touch (a slice counts as a slice), for a GEMM or an attention op the sizes of its operands, for a fused op the tensors
of each of its launches, partial sums included. Re-reads that hit a cache are not counted.
"""

import copy
import math
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import sympy
import torch
import torch._inductor.compile_fx as compile_fx
from torch import Tensor
from torch._inductor import async_compile, ir, scheduler
from torch._inductor.dependencies import MemoryDep
from torch._inductor.virtualized import V
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.functions import Identity


@dataclass
class Kernel:
    """One launch, or one call of a library. kind: triton, copy, gemm, attention, fused op or other; bytes: moved at least once."""

    name: str
    kind: str
    bytes: int
    launches: int = 1
    column_sum: bool = False  # a reduction that writes less than an eighth of what it reads: not one of rows


@dataclass
class Graph:
    """What Inductor made of one forward or backward graph."""

    backward: bool
    kernels: list[Kernel] = field(default_factory=list)
    saved: int = 0  # bytes saved for the backward, without parameters


def size_of(node) -> int:
    """Return the bytes of an IR node; for a view, those of its elements."""
    try:
        return math.prod(int(s) for s in node.get_size()) * node.get_dtype().itemsize
    except (NotImplementedError, AttributeError):
        return 0


def extern_inputs(node) -> list:
    """Return the tensors among the inputs of an extern kernel, each once."""
    flat = [t for t in tree_leaves(list(node.inputs)) if isinstance(t, ir.IRNode) and not isinstance(t, ir.NoneAsConstantBuffer)]
    return list({(t.get_name(), str(t.get_size()), str(t.get_layout().offset)): t for t in flat if hasattr(t, "get_size")}.values())


def footprint(dep, limit: int, batch: int) -> tuple[bool, object]:
    """Return (all, touched): whether a MemoryDep touches `limit` elements or more; else the elements that it touches for one of
    `batch` samples as an array, or their number if they depend on data (an embedding)."""
    free = [(v, int(s)) for v, s in zip(dep.var_names, dep.size, strict=True) if v in dep.index.free_symbols]
    count = math.prod(s for _, s in free)
    index = dep.index.replace(Identity, lambda inner: inner)
    if count >= limit and not index.atoms(sympy.Function):
        return True, None
    if index.free_symbols - {v for v, _ in free}:
        return False, count
    if free and free[0][1] % batch == 0:  # the first variable is the outermost: samples are alike
        free[0] = free[0][0], free[0][1] // batch
    names = {"ModularIndexing": lambda x, d, m: x // d % m, "FloorDiv": lambda x, d: x // d, "Mod": np.mod, "PythonMod": np.mod}
    function = sympy.lambdify([v for v, _ in free], index, modules=[names, "numpy"])
    grids = np.ogrid[tuple(slice(0, s) for _, s in free)] if free else []
    return False, np.unique(np.asarray(function(*grids)).ravel())


def leaves(name: str, node) -> bool:
    """Return whether another scheduler node reads the buffer `name` that this one computes."""
    users = {u.node for u in node.scheduler.name_to_buf[name].users}
    return bool(users - set(node.get_nodes()) - {node})


def touched_bytes(name: str, accesses: list, batch: int) -> int:
    """Return the bytes of a buffer that a kernel's accesses touch; 0 if it is not a tensor."""
    buffer = V.graph.name_to_buffer.get(name) or V.graph.graph_inputs.get(name)
    if buffer is None or not hasattr(buffer, "get_dtype"):
        return 0
    itemsize, limit = buffer.get_dtype().itemsize, math.prod(int(s) for s in buffer.get_size())
    sets, rough = [], 0
    for dep in accesses:
        touches_all, touched = footprint(dep, limit, batch) if isinstance(dep, MemoryDep) else (True, None)
        if touches_all:
            return limit * itemsize
        if isinstance(touched, np.ndarray):
            sets.append(touched)
        else:
            rough += touched
    return min(limit, rough + batch * (len(np.unique(np.concatenate(sets))) if sets else 0)) * itemsize


def triton_bytes(node, batch: int) -> tuple[int, int]:
    """Return the bytes that a generated Triton kernel reads and writes: per buffer, the elements that its accesses touch."""
    inside = {b for m in node.get_nodes() for b in m.get_buffer_names()}
    totals = []
    for deps, counts in (
        (node.read_writes.reads, lambda name: name not in inside),
        (node.read_writes.writes, lambda name: name not in inside or leaves(name, node)),
    ):
        by_buffer = defaultdict(list)
        for dep in deps:
            by_buffer[dep.name].append(dep)
        totals.append(sum(touched_bytes(name, accesses, batch) for name, accesses in by_buffer.items() if counts(name)))
    return totals[0], totals[1]


def moves_only(node) -> bool:
    """Return whether a generated kernel only loads and stores."""
    for member in node.get_nodes():
        body = getattr(member, "_body", None)
        if body is None or member.is_reduction():
            return False
        for block in (body.root_block, *body.subblocks.values()):
            for call in block.graph.nodes:
                if call.op == "call_method" and call.target not in ("load", "store", "get_index", "to_dtype"):
                    return False
                if call.op == "call_method" and call.target == "to_dtype":
                    return False  # a cast is work
    return True


def launched_bytes(op: OpOverload, args: tuple, kwargs: dict) -> list[int]:
    """Return the bytes that each Triton kernel of a fastdit op must move, partial sums included.

    args, kwargs: the op's arguments; tensors are those of a FakeTensorMode. The op's code runs with a `launch` that adds up the
    tensors it is given; of qkv only q and k are read.
    """
    sizes = []

    def launch(kernel, grid, like, *given, **options):
        tensors = {id(t): (name, t) for name, t in zip(kernel.arg_names, given, strict=False) if isinstance(t, Tensor)}
        sizes.append(sum(t.nbytes * 2 // 3 if name == "qkv_ptr" else t.nbytes for name, t in tensors.values()))

    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastdit.kernels.") and hasattr(module, "launch"):
                patches.enter_context(patch.object(module, "launch", launch))
        # The code is the same for every backend key; a call of the op would end at its fake.
        op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
    return sizes


def fused_op(node: ir.FallbackKernel, name: str) -> Kernel:
    """Return a fastdit op of Inductor's schedule as a kernel."""
    with V.graph.fake_mode:
        tensors = [ir.ir_node_to_tensor(t) for t in node.inputs]
        args, kwargs = node.unflatten_args(tensors, node.constant_args)
        sizes = launched_bytes(node.op_overload, args, kwargs)
    return Kernel(name, "fused op", sum(sizes), len(sizes))


def describe(node, batch: int) -> Kernel | None:
    """Return a node of Inductor's final schedule as a kernel; None if it launches nothing."""
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return None
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        origins = Counter(
            o.target.__name__ if callable(o.target) else str(o.target) for m in node.get_nodes() for o in m.node.origins
        )
        label = "+".join(o.partition(".")[0] for o, _ in origins.most_common(5))
        label = ("red " if any(m.is_reduction() for m in node.get_nodes()) else "") + label
        reads, writes = triton_bytes(node, batch)
        sums = any(m.is_reduction() for m in node.get_nodes()) and 8 * writes < reads
        return Kernel(label, "copy" if moves_only(node) else "triton", reads + writes, column_sum=sums)
    op = node.node
    if isinstance(op, ir.MultiOutput):
        return None
    name = getattr(op, "python_kernel_name", None) or str(getattr(op, "op_overload", type(op).__name__))
    inputs = extern_inputs(op)
    if isinstance(op.layout, ir.MultiOutputLayout):
        outputs = [
            u.node.node for b in node.get_outputs() for u in b.users if isinstance(getattr(u.node, "node", None), ir.MultiOutput)
        ]
    else:
        outputs = [op]
    total = sum(size_of(t) for t in inputs) + sum(size_of(t) for t in outputs)
    if "fastdit" in name:
        return fused_op(op, name.rpartition("fastdit.")[2].removeprefix("fastdit::"))
    if "attention" in name:
        return Kernel(name, "attention", total)
    if any(word in name for word in ("mm", "convolution")):
        return Kernel(name, "gemm", total)
    return Kernel(name, "copy" if any(w in name for w in ("clone", "copy", "contiguous")) else "other", total)


class Compiler:
    """Inductor as a backend for torch.compile whose result runs the FX graph (on fake tensors) instead of the kernels."""

    def __init__(self, batch: int) -> None:
        """batch: batch size of the compiled step, to count what kernels touch per sample."""
        self.batch = batch
        self.graphs: list[Graph] = []
        self.dynamo_graphs = 0
        self.parameters: set[str] = set()  # of the last forward graph

    def __call__(self, gm, example_inputs):
        self.dynamo_graphs += 1
        return compile_fx.compile_fx(gm, example_inputs, inner_compile=self.inner)

    def inner(self, gm, example_inputs, **options):
        """Replace compile_fx_inner: compile, record the schedule, and return what runs `gm`."""
        runnable, graph = copy.deepcopy(gm), Graph(bool(options.get("is_backward")))
        self.graphs.append(graph)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        if graph.backward:
            saved = [n for n in placeholders if not n.name.startswith(("tangents", "rng")) and n.name not in self.parameters]
            graph.saved = sum(v.numel() * v.itemsize for n in saved if isinstance(v := n.meta.get("val"), Tensor))
        else:
            self.parameters = {placeholders[i].name for i in options.get("static_input_idxs", ()) if i < len(placeholders)}
        schedule, triton_call = scheduler.Scheduler.codegen, async_compile.AsyncCompile.triton

        def codegen(scheduler_):
            graph.kernels = [k for k in (describe(node, self.batch) for node in scheduler_.nodes) if k]
            return schedule(scheduler_)

        scheduler.Scheduler.codegen = codegen
        async_compile.AsyncCompile.triton = lambda *args, **options: SimpleNamespace(run=None)  # not compiled further
        try:
            compile_fx.compile_fx_inner(gm, example_inputs, **options)
        finally:
            scheduler.Scheduler.codegen, async_compile.AsyncCompile.triton = schedule, triton_call

        def run(args):
            given = list(args)
            args.clear()
            return runnable(*given)

        run._boxed_call = True
        return run
