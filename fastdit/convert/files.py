"""Foreign weights are read here, and the run that they become is written."""

import argparse
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.config import Config, InputError


def read(file: Path) -> Any:
    """Return what torch.save wrote to a file: tensors, mapped into memory if the file is a zip archive, and plain values.

    Code in the file is never run. The one class that is made is argparse.Namespace, in which training scripts save their settings.
    Raises InputError if the file is missing, damaged or contains anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError as error:
        raise InputError(f"checkpoint {file} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch's unpickler raises a dozen kinds, UnicodeDecodeError and KeyError among them
        raise InputError(f"{file} is damaged or contains more than tensors: it was not loaded") from error


def write(out: Path, weights: dict[str, Tensor], config: Config, step: int, origin: str, vae: Any = None) -> Path:
    """Write converted weights as the run `out`, with a diffusers AutoencoderKL, if given, in out/autoencoder.

    Returns the checkpoint's folder. Raises InputError if `out` cannot be written.
    """
    from fastdit import checkpoint  # needs safetensors, which converting does not

    try:
        out.mkdir(parents=True, exist_ok=True)
        if vae:
            vae.save_pretrained(out / "autoencoder")
        return checkpoint.save_weights(out / "checkpoints", weights, config, step, origin)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}: choose another folder") from error


def refuse_taken(out: Path) -> None:
    """Raise InputError if the folder of the run to make holds checkpoints already."""
    from fastdit import checkpoint

    if checkpoint.find(out):
        raise InputError(f"--out {out} holds checkpoints already: choose another folder")
