"""adamw_step against torch's fused AdamW and lerp: bit for bit on a CPU, within derived roundings in Triton's interpreter."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends import BACKENDS, DEVICE
from fastdit import kernels
from fastdit.kernels import adamw, library

SIZES = [(1,), (3,), (8191,), (8193,), (64, 48), (0,), (2, 4, 16)]
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
WEIGHTS = (0.1, 0.7)  # of two averages: lerp has a formula on either side of a half
VECTOR = 16  # elements of torch's widest vectors
FUSED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and library.EXTENSION and library.cpp.isa() > 0
EXACT = [pytest.param("cpp", marks=pytest.mark.skipif(not FUSED, reason="torch or the C++ kernels have no FMA here"))]


def random(seed, sizes=SIZES, device=DEVICE):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g).to(device) for size in sizes]


def make(copy=None, averages=0, dtype=torch.float32, device=DEVICE):
    """Masters as they start, moments of some steps, averages elsewhere, copies."""
    numbers = lambda seed: [t.to(dtype) for t in random(seed, device=device)]
    masters, exp_avgs, squares = numbers(0), [t * 0.1 for t in numbers(1)], [(t.square() + 1) * 0.1 for t in numbers(2)]
    copies = None if copy is None else [m.to(copy) for m in masters]
    moving = [numbers(3 + k) for k in range(averages)]
    return kernels.AdamWTensors(masters, exp_avgs, squares, copies, moving)


def scalars(scale=1.0, found_inf=0.0, device=DEVICE):
    return {"grad_scale": torch.tensor(scale, device=device), "found_inf": torch.tensor(found_inf, device=device)}


def everything(tensors):
    lists = (tensors.masters, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.copies or [], *tensors.averages)
    return [t for some in lists for t in some]


@pytest.mark.parametrize("backend", ["reference", *EXACT])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.3, 0.99), (0.5, 0.2)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_200_steps_are_torchs_to_the_last_bit(backend, betas, decay):
    """Gradients that are clipped, steps that are skipped, an average that is left out of every other step.

    The elements that fill no vector are compared from the same state in each step: the compiler of torch sums theirs in another
    order, so C++ may be one unit of the last place off. With beta1 <= 0.5, which no one uses, the lerp of torch cancels there."""
    options = OPTIONS | {"betas": betas, "weight_decay": decay}
    sizes = SIZES if betas[0] > 0.5 else [size for size in SIZES if math.prod(size) % VECTOR == 0]
    masters = random(0, sizes, "cpu")
    theirs, average = [m.clone() for m in masters], [m.clone() for m in masters]
    moments = [[torch.zeros_like(m) for m in masters] for _ in range(2)]
    tensors = kernels.AdamWTensors(masters, *moments, averages=[[m.clone() for m in masters]])
    torchs, taken = torch.optim.AdamW(theirs, fused=True, **options), 0
    for step in range(200):
        gradients, found = random(1000 + step, sizes, "cpu"), float(step % 7 == 3)
        scale = 1.0 if step % 3 else 1.0 + step / 10
        given = [g.clone() for g in gradients]
        weights = (1 / (step + 2),) if step % 2 else ()
        with kernels.backend(backend):
            kernels.adamw_step(tensors, given, step=taken + 1, **options, **scalars(scale, found, "cpu"), weights=weights)
        assert all(torch.equal(a, b) for a, b in zip(given, gradients, strict=True))
        if not found:
            taken += 1
            for p, g in zip(theirs, gradients, strict=True):
                p.grad = g
            torchs.grad_scale = torch.tensor(scale)
            torchs.step()
            if weights:
                torch._foreach_lerp_(average, theirs, weights[0])
        wanted = [*theirs, *(torchs.state[p][key] for key in ("exp_avg", "exp_avg_sq") for p in theirs), *average]
        for ours, theirs_now in zip(everything(tensors), wanted, strict=True):
            a, b = ours.view(-1), theirs_now.view(-1)
            full = len(a) if backend == "reference" else len(a) // VECTOR * VECTOR
            assert torch.equal(a[:full], b[:full]), step
            assert (torch.nextafter(a, b)[full:] == b[full:]).all(), step
            a[full:] = b[full:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("averages", [0, 2])
def test_one_step_is_the_references_within_roundings(values, backend, gradient, averages):
    """From the same state. Each result is a sum of two terms, each of at most two roundings before the last: 3 half units of the
    larger of the terms. The update itself has five more, of a number of the size lr."""
    copy = None if gradient == torch.float32 else gradient
    gradients = [g.to(gradient) for g in random(9)]
    ours, truth = make(copy, averages), make(None, averages, dtype=torch.float64)
    with kernels.backend(backend):
        kernels.adamw_step(ours, gradients, step=7, **OPTIONS, **scalars(2.5), weights=WEIGHTS[:averages])
    kernels.adamw_step_reference(
        truth, gradients, step=7, **OPTIONS, grad_scale=torch.tensor(2.5, dtype=torch.float64, device=DEVICE),
        found_inf=torch.tensor(0.0, device=DEVICE), weights=WEIGHTS[:averages],
    )  # fmt: skip
    start, unit = make(copy, averages, dtype=torch.float64), torch.finfo(torch.float32).eps / 2
    for name in ("masters", "exp_avgs", "exp_avg_sqs"):
        for i, (a, t, s) in enumerate(zip(getattr(ours, name), getattr(truth, name), getattr(start, name), strict=True)):
            g = gradients[i].double() / 2.5
            term = {"masters": s.abs() + 8 * OPTIONS["lr"], "exp_avgs": s.abs() + g.abs(), "exp_avg_sqs": s + g * g}[name]
            assert ((a.double() - t).abs() <= 4 * unit * term).all(), (name, i)
    for average, wanted in zip(ours.averages, truth.averages, strict=True):
        for a, t, m in zip(average, wanted, truth.masters, strict=True):
            assert ((a.double() - t).abs() <= 6 * unit * (a.abs() + m.abs() + 8 * OPTIONS["lr"])).all()
    for p, m in zip(ours.copies or (), ours.masters, strict=False):
        if backend == "triton" and gradient == torch.bfloat16 and not torch.cuda.is_available():  # the interpreter truncates
            assert torch.equal(p.view(torch.int16), (m.view(torch.int32) >> 16).to(torch.int16))
        else:
            assert torch.equal(p, m.to(gradient))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("found", [1.0, torch.nan])
def test_nothing_is_written_where_a_gradient_is_not_finite(backend, found):
    tensors = make(torch.bfloat16, 2)
    for copy in tensors.copies:
        copy.fill_(3)  # not even what would be the same again
    before = [t.clone() for t in everything(tensors)]
    gradients = [torch.full_like(m, torch.inf) for m in tensors.masters]
    with kernels.backend(backend):
        kernels.adamw_step(tensors, gradients, step=1, **OPTIONS, **scalars(torch.nan, found), weights=WEIGHTS)
    assert all(torch.equal(a, b) for a, b in zip(everything(tensors), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_written_outside_of_the_tensors(values, backend):
    """Views of wider memory, some of them not aligned to 16 bytes, keep NaN around them; the others are as without it."""
    plain, band = make(torch.bfloat16, 1), 4096
    buffers = []

    def inside(t, shift):
        buffer = torch.full((t.numel() + 2 * band,), torch.nan, dtype=t.dtype, device=DEVICE)
        at = slice(band + shift, band + shift + t.numel())
        buffer[at] = t.flatten()
        buffers.append((buffer, at))
        return buffer[at].view(t.shape)

    fields = [plain.masters, plain.exp_avgs, plain.exp_avg_sqs, plain.copies, plain.averages[0]]
    views = [[inside(t, (i + k) % 3) for i, t in enumerate(field)] for k, field in enumerate(fields)]
    wide = kernels.AdamWTensors(*views[:4], [views[4]])
    gradients = [g.bfloat16() for g in random(9)]
    with kernels.backend(backend):
        for tensors in (plain, wide):
            kernels.adamw_step(tensors, gradients, step=3, **OPTIONS, **scalars(), weights=(0.1,))
    assert all(torch.equal(a, b) for a, b in zip(everything(plain), everything(wide), strict=True))
    for buffer, at in buffers:
        buffer[at] = torch.nan
        assert buffer.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_may_move_and_numbers_change_between_steps(backend):
    """The addresses of the last step's gradients are not used again; weights=() leaves the averages as they were."""
    one, two, static = make(None, 1), make(None, 1), random(20)
    with kernels.backend(backend):
        for step in (1, 2, 3):
            gradients = random(20 + step)
            kernels.adamw_step(one, gradients, step=step, **OPTIONS, **scalars(), weights=(0.5 / step,) if step != 2 else ())
            for s, g in zip(static, gradients, strict=True):
                s.copy_(g)
            average = [a.clone() for a in two.averages[0]]
            kernels.adamw_step(two, static, step=step, **OPTIONS, **scalars(), weights=(0.5 / step,) if step != 2 else ())
            assert step != 2 or all(torch.equal(a, b) for a, b in zip(two.averages[0], average, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(two), strict=True))


def test_what_did_not_change_is_not_uploaded_again(monkeypatch):
    """So that a captured step is one launch; and one that has something to upload is not captured."""
    tensors, gradients, uploads = make(torch.bfloat16, 1), [g.bfloat16() for g in random(9)], []
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, *a, **k: uploads.append(t is tensors.changing) or copy_(t, *a, **k))
    with kernels.backend("triton"):
        for step in (1, 1, 2):
            kernels.adamw_step(tensors, gradients, step=step, **OPTIONS, **scalars(), weights=(0.1,))
    assert uploads.count(True) == 2
    monkeypatch.setattr(tensors, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a new upload cannot be captured"):
        tensors.upload([1.0], gradients)


@pytest.mark.skipif(not library.EXTENSION, reason="the C++ extension is not built")
def test_the_same_bits_at_any_number_of_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            tensors, gradients = make(torch.bfloat16, 1, device="cpu"), random(9, device="cpu")
            with kernels.backend("cpp"):
                kernels.adamw_step(tensors, gradients, step=1, **OPTIONS, **scalars(device="cpu"), weights=(0.1,))
            found.append(everything(tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autograd_sees_that_the_weights_changed(backend):
    """As with torch's own: a backward through the weights of before a step is an error, not a wrong gradient."""
    weight, other = (torch.randn(4, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    tensors = kernels.AdamWTensors([weight.detach()], [torch.zeros_like(weight)], [torch.zeros_like(weight)])
    loss = (other @ weight).sum()
    with kernels.backend(backend):
        kernels.adamw_step(tensors, [torch.ones_like(weight)], step=1, **OPTIONS, **scalars())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def zeros(*sizes, dtype=torch.float32, device="cpu"):
    return [torch.zeros(size, dtype=dtype, device=device) for size in sizes]


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("exp_avgs", zeros(4), r"exp_avgs has 1 tensors, but one for each of 2 parameters"),
        ("exp_avgs", zeros(4, 7), r"exp_avgs\[1\] is torch.float32 \[7\].* but 6 contiguous elements of torch.float32 on cpu"),
        ("exp_avg_sqs", zeros(4, 6, dtype=torch.bfloat16), "exp_avg_sqs has dtype torch.bfloat16, but torch.float32 is needed"),
        ("masters", zeros(4, 6, dtype=torch.bfloat16), "masters has dtype torch.bfloat16, but torch.float32 or"),
        ("copies", [*zeros(4), *zeros(6, dtype=torch.float16)], r"copies\[1\] is torch.float16"),
        ("gradients", [torch.zeros(8)[::2], torch.zeros(6)], r"gradients\[0\] is torch.float32 \[4\], strides \[2\]"),
        ("gradients", zeros(4, 6, dtype=torch.int64), "gradients has dtype torch.int64"),
        ("gradients", zeros(4, 6, device="meta"), r"gradients\[0\] .* on meta, but .* on cpu are needed"),
        ("averages", [zeros(4, 5)], r"averages\[0\]\[1\] is"),
        ("weights", (0.1,), "1 weights were given for 0 averages"),
    ],
)
def test_bad_input(monkeypatch, field, given, message):
    """One sentence, and before anything runs."""
    monkeypatch.setattr(adamw, "launch", lambda *_, **__: pytest.fail("launched"))
    lists = {name: zeros(4, 6) for name in ("masters", "exp_avgs", "exp_avg_sqs", "gradients")} | {"averages": [], "weights": ()}
    lists[field] = given
    gradients, weights = lists.pop("gradients"), lists.pop("weights")
    with pytest.raises(ValueError, match=message):
        kernels.adamw_step(kernels.AdamWTensors(**lists), gradients, step=1, **OPTIONS, **scalars(device="cpu"), weights=weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize(
    "given",
    [torch.ones((), dtype=torch.float64), torch.tensor(True), torch.ones(2), torch.ones((), device="meta")],
    ids=["fp64", "bool", "two", "meta"],
)
def test_scalars_are_one_fp32_each_on_the_device(backend, name, given):
    tensors = kernels.AdamWTensors(*([torch.ones(4, device=DEVICE)] for _ in range(3)))
    given = given if given.is_meta else given.to(DEVICE)
    with kernels.backend(backend), pytest.raises(ValueError, match=f"{name} is {given.dtype}.* but one torch.float32 on"):
        kernels.adamw_step(tensors, [torch.ones(4, device=DEVICE)], step=1, **OPTIONS, **{**scalars(), name: given})


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_needs_the_reference(backend):
    tensors = make(dtype=torch.float64)
    with kernels.backend(backend), pytest.raises(ValueError, match="do not compute in float64"):
        kernels.adamw_step(tensors, random(9), step=1, **OPTIONS, **scalars())


def machine_code(arch):
    """Of the kernel with bf16 gradients and copies and one average; in a process without the interpreter."""
    from benchmarks import machine_code

    sizes = [(1000,), (384, 384), (8193,)]
    make_all = lambda dtype: [torch.zeros(size, dtype=dtype) for size in sizes]
    fields = [make_all(torch.float32) for _ in range(3)]
    with machine_code.Recorder(arch) as recorder, kernels.backend("triton"):
        tensors = kernels.AdamWTensors(*fields, make_all(torch.bfloat16), [make_all(torch.float32)])
        for step in (1, 2):  # of another gradient, which must compile nothing
            kernels.adamw_step(
                tensors, make_all(torch.bfloat16), step=step, **OPTIONS, **scalars(device="cpu"), weights=(0.1 / step,)
            )
    first, second = recorder.take()
    (found,) = machine_code.machine_code([first.compiled.asm["cubin"]], arch)
    offsets = machine_code.narrow_offsets(first.compiled.asm["ttgir"])
    return found | {"recompiled": first.compiled.hash != second.compiled.hash, "narrow_offsets": len(offsets), "grid": first.grid}


if __name__ == "__main__":
    print(json.dumps(machine_code(int(sys.argv[1]))))


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100, 120))])
def test_the_machine_code_spills_nothing_and_moves_128_bits(arch):
    """A thread has 8 elements: of each fp32 tensor two accesses, of a bf16 one a single one, besides those of a tensor's last block
    and of addresses and numbers."""
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [root, root / "tests/support", *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run([sys.executable, __file__, str(arch)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["local"] == found["stack"] == found["spills"] == 0 and found["narrow_offsets"] == 0 and not found["recompiled"]
    assert found["loads_128"] == found["stores_128"] == 4 * 2 + 1
    assert found["grid"] == [1 + 144 + 9]
