"""Devices, precisions and memory, as they are asked for by name."""

import os

import pytest
import torch

from fastdit import device
from fastdit.config import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("fast", [False, True])
def test_auto_precision_is_bf16_where_it_is_fast(monkeypatch, fast):
    monkeypatch.setattr(device, "native_bf16", lambda _: fast)
    assert [device.precision(name, CPU) for name in ("auto", "bf16", "fp32")] == ["bf16" if fast else "fp32", "bf16", "fp32"]


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device("auto") == device.choose_device("cpu") == CPU
    for name in ("cuda", "gpu"):
        with pytest.raises(InputError, match=f"--device {name}: PyTorch sees no GPU here: use --device cpu"):
            device.choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose_device("auto") == device.choose_device("gpu") == device.choose_device("cuda") == CUDA
    assert device.choose_device("cpu") == CPU


def test_versions_are_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(device, "PACKAGES", ("torch", "no-such-package"))
    versions = device.versions()
    assert versions["torch"] == str(torch.__version__) and versions["no-such-package"] == "missing"
    assert {"fastdit", "python", "kernel launches"} <= set(versions)


def test_a_cpu_has_a_name_threads_and_memory(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert device.device_name(CPU).endswith(", 2 threads")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert device.device_name(CPU).endswith(", 1 thread")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < device.free_memory(CPU) < total
    held = torch.ones(1 << 26)  # 256 MB
    assert held.nbytes < device.peak_memory(CPU) < total
    device.synchronize(CPU)


def test_a_backend_that_cannot_run_is_one_sentence(monkeypatch):
    def refuse(_):
        raise ValueError("no such backend")

    assert device.check_backend(CPU) in ("triton", "cpp", "reference")
    monkeypatch.setenv("FASTDIT_KERNELS", "quick")
    monkeypatch.setattr(device.kernels, "backend_in_use", refuse)
    with pytest.raises(InputError, match="FASTDIT_KERNELS=quick: no such backend"):
        device.check_backend(CPU)
