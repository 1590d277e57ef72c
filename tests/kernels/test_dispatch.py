"""The choice of a backend, and the common parts of all kernel files: registration, layouts under a compiler."""

import os
import subprocess
import sys

import pytest
import torch

from backends import DEVICE
from fastdit import kernels
from fastdit.kernels import dispatch, library

CPU = torch.device("cpu")


def arguments(device: torch.device = DEVICE) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator).to(device) for shape in ((2, 7, 64), (2, 64), (2, 64)))


def test_auto_is_triton_on_cuda_and_cpp_on_a_cpu(monkeypatch):
    with kernels.backend("auto"):
        assert kernels.backend_in_use(torch.device("cuda")) == "triton"
        assert kernels.backend_in_use(torch.device("meta")) == "reference"
        monkeypatch.setattr(dispatch, "EXTENSION", "built")
        assert kernels.backend_in_use(CPU) == "cpp"
        monkeypatch.setattr(dispatch, "EXTENSION", None)
        assert kernels.backend_in_use(CPU) == "reference"


def test_cpp_needs_a_cpu_and_the_extension(monkeypatch):
    with kernels.backend("cpp"):
        monkeypatch.setattr(dispatch, "EXTENSION", "built")
        with pytest.raises(RuntimeError, match=r"^kernel backend 'cpp' cannot run on cuda: use 'auto'"):
            kernels.backend_in_use(torch.device("cuda"))
        monkeypatch.setattr(dispatch, "EXTENSION", None)
        with pytest.raises(RuntimeError, match=r"^kernel backend 'cpp' is not built: install with FASTDIT_BUILD_EXT=1"):
            kernels.modulate(*arguments())


def test_triton_needs_cuda_or_the_interpreter(monkeypatch):
    with kernels.backend("triton"):
        assert kernels.backend_in_use(torch.device("cuda")) == "triton"
        monkeypatch.setattr(dispatch, "INTERPRETED", True)
        assert kernels.backend_in_use(CPU) == "triton"
        with pytest.raises(RuntimeError, match="cannot run on xpu"):
            kernels.backend_in_use(torch.device("xpu"))
        monkeypatch.setattr(dispatch, "INTERPRETED", False)
        with pytest.raises(RuntimeError, match=r"^kernel backend 'triton' cannot run on cpu: set TRITON_INTERPRET=1"):
            kernels.modulate(*arguments(CPU))


@pytest.mark.parametrize("name", ["auto", "reference", "triton"])
def test_the_meta_device_gives_a_backends_shapes(name):
    """Nothing runs there: `fastdit plan` asks which tensors Triton's ops save, without a GPU."""
    meta = torch.device("meta")
    with kernels.backend(name):
        assert kernels.backend_in_use(meta) == ("reference" if name == "auto" else name)
        x, shift, scale = (t.to(meta) for t in arguments())
        y = kernels.modulate(x, shift, scale)
    assert y.device == meta and y.shape == x.shape and y.dtype == x.dtype


def test_names():
    with kernels.backend("reference"), kernels.backend("triton"):
        assert dispatch._setting == "triton"
    with pytest.raises(ValueError, match="kernel backend 'cuda' is unknown: choose one of auto, triton, cpp, reference"):
        kernels.backend("cuda").__enter__()


@pytest.mark.usefixtures("values")
def test_a_device_that_computes_has_its_values_compared():
    """FASTDIT_NO_VALUES=1, which compares none, is refused there."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_names"]
    done = subprocess.run(command, env=os.environ | {"FASTDIT_NO_VALUES": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "computes: unset it" in done.stdout + done.stderr


def test_the_setting_is_restored_after_an_error():
    before = dispatch._setting
    with pytest.raises(KeyError), kernels.backend("reference"):
        raise KeyError
    assert dispatch._setting == before


def test_a_compiled_function_follows_the_setting():
    """The setting is a guard: a graph that was compiled for one backend does not run under another."""
    torch._dynamo.reset()
    ops = []

    def record(graph, _):
        ops.append(str([node.target for node in graph.graph.nodes]))
        return graph.forward

    compiled = torch.compile(lambda *a: kernels.modulate(*a), fullgraph=True, backend=record)
    for name, expected in (("triton", 1), ("reference", 2), ("triton", 2)):
        with kernels.backend(name):
            compiled(*arguments())
        assert len(ops) == expected
    assert "layer_norm" not in ops[0] and "layer_norm" in ops[1]


def call(op: str) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return inputs, B = 2, T = 7, H = 64, that require grad, and the outputs of Triton."""
    streams, modulation = {"modulate": (1, 2), "gated_residual": (2, 1), "gated_residual_modulate": (2, 3), "swiglu": (1, 0)}[op]
    inputs = [torch.randn(shape, requires_grad=True, device=DEVICE) for shape in [(2, 7, 64)] * streams + [(2, 64)] * modulation]
    with kernels.backend("triton"):
        out = getattr(kernels, op)(*inputs)
    return inputs, out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize(
    ("op", "streams", "rows", "modulation"),
    [("modulate", 1, 2, 2), ("gated_residual", 1, 0, 1), ("gated_residual_modulate", 2, 2, 3)],
)
def test_what_is_saved_for_the_backward(op, streams, rows, modulation):
    """As in kernels/README.md: [B,T,H] tensors, fp32 numbers per row, and the modulation, which the model holds anyway."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda _: None):
        call(op)
    assert sum(saved) == streams * 2 * 7 * 64 + rows * 2 * 7 + modulation * 2 * 64


@pytest.mark.parametrize("op", ["modulate", "gated_residual", "gated_residual_modulate", "swiglu"])
def test_backend_of_the_forward_runs_the_backward(recorded_ops, op):
    """Also outside of its `with backend(…)` block; and the reference runs no library op."""
    inputs, outputs = call(op)
    with kernels.backend("reference"), recorded_ops() as recorded:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs])
        assert f"{op}_backward_triton" in recorded.names
        recorded.names.clear()
        getattr(kernels, op)(*inputs)
    assert recorded.names and not any(name.endswith(("_triton", "_cpp")) for name in recorded.names)


@pytest.mark.parametrize("op", ["modulate", "gated_residual", "gated_residual_modulate"])
def test_second_derivatives_are_refused(op):
    """The backward op is opaque: a gradient through it would be lost without a word."""
    inputs, outputs = call(op)
    total = sum(t.square().sum() for t in outputs)
    first = torch.autograd.grad(total, inputs[-1], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.slow
def test_inductor_keeps_the_layout_of_what_it_feeds(monkeypatch):
    """A transposed input and a modulation cut out of a wider tensor reach the op with the strides that they have in eager."""

    def function(x, packed):
        return kernels.modulate(x.mT * 2, *(packed + 1).chunk(6, dim=1)[2:4])

    seen, find = [], library.inner_contiguous
    module = sys.modules["fastdit.kernels.modulate"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "inner_contiguous", lambda t: seen.append((t.shape, t.stride())) or find(t))
    torch._dynamo.reset()
    x, packed = torch.randn(2, 64, 7, device=DEVICE), torch.randn(2, 6 * 64, device=DEVICE)
    with kernels.backend("triton"):
        eager = function(x, packed)
        count = len(seen)
        compiled = torch.compile(function, fullgraph=True)(x, packed)
    assert count == 3 and seen[:count] == seen[count:]
    torch.testing.assert_close(compiled, eager)


def test_every_library_op_keeps_the_layout_of_its_inputs():
    """Tagged so that Inductor hands over exact strides; functional, so nothing is mutated or aliased."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastdit::")]
    assert len(names) >= 6
    for name in names:
        op = getattr(torch.ops.fastdit, name.removeprefix("fastdit::")).default
        assert set(op.tags) & set(library._TAGS), name
        assert not op._schema.is_mutable, name
        assert all(result.alias_info is None for result in op._schema.returns), name
