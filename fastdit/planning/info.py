"""`fastdit info`: versions, the device, and what runs on it by default."""

import argparse

import torch

from fastdit import attention, kernels
from fastdit.config import Config
from fastdit.device import DTYPES, check_backend, device_name, versions
from fastdit.kernels import library
from fastdit.training import engine


def info() -> str:
    """Return the versions, the device, and what runs on it by default, as text. Raises InputError for a bad FASTDIT_KERNELS."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = check_backend(device)
    extension = "not built: install again with a C++ compiler and FASTDIT_BUILD_EXT=1"
    if library.EXTENSION:
        extension = f"built, runs {library.INSTRUCTION_SETS[library.cpp.isa()]}"
    config = engine.resolve_precision(Config(), device)
    zero = engine.deepspeed_config(config, 2)["zero_optimization"]
    overlap = "with" if zero["overlap_comm"] else "without"
    rows = {
        **versions(), "device": device_name(device), "C++ extension": extension,
        "precision": f"auto is {config.train.precision} here",
        "default ZeRO": f"stage {zero['stage']} {overlap} overlap, buckets of {zero['reduce_bucket_size']:,} elements",
    }  # fmt: skip
    if device.type == "cuda":
        allowed = attention.fused_kernels(config.model, DTYPES[config.train.precision], device, training=True)
        rows["attention"] = f"{' or '.join(allowed)}, as PyTorch chooses"
    lines = [f"{name:20} {value}" for name, value in rows.items()]
    return "\n".join([*lines, "", f"kernel backend on {device.type}:", *(f"  {op:26} {backend}" for op in kernels.OPS)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit info`: none."""
    parser.description = "Show the installed versions, the device, and which kernel backend each op uses on it."


def run(_: argparse.Namespace) -> str:
    """Return the text of `info`."""
    return info()
