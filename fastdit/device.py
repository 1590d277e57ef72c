"""What this machine is and can: devices, precisions, memory, installed versions."""

import functools
import os
import resource
import sys
from importlib import metadata
from pathlib import Path

import torch

from fastdit import kernels
from fastdit.config import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the parameters, by what precision and --dtype call them


@functools.cache
def native_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls are fast on `device`: NVIDIA GPUs since Ampere, CPUs that oneDNN has kernels for (AVX-512 and newer).
    Elsewhere PyTorch's fallback runs: on two AVX2 cores 1.8 GFLOP/s, where fp32 reaches 137."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def precision(wanted: str, device: torch.device) -> str:
    """bf16 or fp32 as wanted; "auto" is bf16 where the device has fast matmuls in it."""
    if wanted == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return wanted


def choose_device(name: str) -> torch.device:
    """auto (CUDA when there is one) | cpu | cuda, or the base command's gpu. Raises InputError when there is none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: PyTorch sees no GPU here: use --device cpu")
    return torch.device("cuda")


PACKAGES = ("torch", "triton", "deepspeed", "diffusers", "nvidia-dali-cuda130", "wandb", "flash-attn")


def versions() -> dict[str, str]:
    """Installed versions of fastdit and of what it stands on; "missing" where a package is not installed."""
    from fastdit import __version__

    found = {"fastdit": __version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    found["torch"] = str(torch.__version__)  # names the CUDA too, as 2.14.1+cu130, which the metadata of PyPI's builds leaves out
    found["kernel launches"] = str(kernels.tuning.VERSION)  # another version may differ in the last bit of a gradient
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch's allocator held on a GPU, or the most that this process held in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def check_backend(device: torch.device) -> str:
    """The kernel backend on `device`. Raises InputError when FASTDIT_KERNELS asks for one that cannot run there."""
    try:
        return kernels.backend_in_use(device)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"FASTDIT_KERNELS={os.environ.get('FASTDIT_KERNELS')}: {error}") from error


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
