"""Devices of this machine: what they are and can, precisions, memory, installed versions."""

import functools
import os
import resource
import sys
from importlib import metadata
from pathlib import Path

import torch

from fastdit import kernels
from fastdit.config import InputError, ModelConfig
from fastdit.kernels import tuning

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of parameters, by the names that train.precision and --dtype use
PACKAGES = ("torch", "triton", "deepspeed", "diffusers", "nvidia-dali-cuda130", "wandb", "flash-attn")


@functools.cache
def native_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls are fast on `device`: NVIDIA GPUs since Ampere, CPUs that oneDNN has kernels for (AVX-512 and newer).

    Other CPUs run PyTorch's fallback: 1.8 GFLOP/s on two AVX2 cores, which reach 137 in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def precision(wanted: str, device: torch.device) -> str:
    """Resolve a precision "fp32" | "bf16" | "auto" for a device: auto is bf16 if its matmuls are fast there."""
    if wanted == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return wanted


def check_memory(model: ModelConfig) -> None:
    """Raise InputError if the fp32 weights of a model, which each rank makes first, are larger than the memory of this machine."""
    per_block = model.width * (4 * model.width + 2 * model.hidden)  # attention and the MLP; the rest is left out
    parameters = model.depth * per_block + model.num_classes * (model.class_width or model.width)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    memory = memory if limit == resource.RLIM_INFINITY else min(memory, limit)
    if 4 * parameters > memory:
        raise InputError(
            f"model.depth={model.depth}, width={model.width}, hidden={model.hidden} and num_classes={model.num_classes} make at "
            f"least {parameters / 1e9:.1f} billion parameters, {4 * parameters / 1e9:.0f} GB in fp32, but this process may use "
            f"{memory / 1e9:.0f} GB: lower them"
        )


def choose_device(name: str) -> torch.device:
    """Return the device of a --device option: "auto" (CUDA if there is a GPU) | "cpu" | "cuda", or "gpu" as in the base command.

    Raises InputError if there is no GPU to use.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: PyTorch sees no GPU here: use --device cpu")
    return torch.device("cuda")


def versions() -> dict[str, str]:
    """Return the versions of fastdit and of the packages that it uses; "missing" if one is not installed."""
    from fastdit import __version__

    installed = {"fastdit": __version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "missing"
    # with the CUDA version, as in 2.14.1+cu130, which the metadata of PyPI's builds leaves out
    installed["torch"] = str(torch.__version__)
    installed["kernel launches"] = str(tuning.VERSION)  # another version may differ in the last bit of a gradient
    return installed


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of torch's allocator on a GPU, or else of this process (its resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def check_backend(device: torch.device) -> str:
    """Return the kernel backend that runs on `device`. Raises InputError if FASTDIT_KERNELS names one that cannot run there."""
    try:
        return kernels.backend_in_use(device)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"FASTDIT_KERNELS={os.environ.get('FASTDIT_KERNELS')}: {error}") from error


def synchronize(device: torch.device) -> None:
    """Wait for all work on a GPU; nothing on a CPU, where no work is pending."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU or of the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
