"""Checkpoints of SiT (arXiv:2401.08740) and REPA (arXiv:2410.06940), converted into the layout of DiT: the same function.

    SiT, by its public code                              here
    x_t = t·data + (1−t)·noise, v = data − noise         x_t = (1−t)·data + t·noise, v = noise − data
    modulation by one Linear per block                   by one per group of blocks
    output by (row, column, channel) of a patch          by (channel, row, column)
    8 output channels, of which 4 are the velocity       4

REPA is the same network with timesteps and velocities as here, 4 output channels, and projectors that only its training uses. The
diffusion model DiT (arXiv:2212.09748) has SiT's names and shapes: what it computes tells it apart.

C channels, p side of a patch, H width, L blocks, T tokens, D classes and the null class.
"""

import argparse
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.config import Config, DataConfig, InputError, ModelConfig, TrainConfig, from_dict
from fastdit.convert import files
from fastdit.convert.base import PUBLISHED_VAE
from fastdit.model import TIME_FEATURES, DiT, TimeEmbedding, fixed_positions
from fastdit.presets import PRESETS

PUBLISHED = {(row["width"], row["depth"]): name for name, row in PRESETS.items() if name.startswith("sit-")}
LATENT_CHANNELS, PIXELS_PER_LATENT = 4, 8  # of the SD-VAE
# SiT averages its fixed positions too. In fp32 an average with a decay of 0.9999 stands still as soon as its increments are below
# half a unit in the last place, for values below 1 at most some 2^-25 / 1e-4 = 3e-4 away from them.
SAME_POSITIONS = 1e-3
LAST_STEP = 999.0  # timestep at which a diffusion model with 1000 of them sees only noise
# Module names of a block: ours and theirs.
LINEARS = {"attention.qkv": "attn.qkv", "attention.out": "attn.proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
MODULATION = "adaLN_modulation.1"


class Imported(NamedTuple):
    """A SiT in the layout of DiT."""

    config: ModelConfig
    weights: dict[str, Tensor]
    step: int  # of training, if the file has it
    notes: list[str]  # for the user: what was recognised, left out and assumed


def split(contents: Any, file: Path) -> tuple[dict[str, Tensor], int, dict]:
    """Return the tensors of a file's contents by their published names, the step of training and its settings, if they were saved.

    contents: a state_dict, or a dict that has one as "ema". Raises InputError if it is neither.
    """
    outer = contents if isinstance(contents, dict) else {}
    state = outer.get("ema", outer)
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) and _is_plain(t) for name, t in state.items()):
        raise InputError(f"{file} does not hold tensors by name, at the top or under the key ema, as a SiT checkpoint does")
    saved = outer.get("args")
    arguments = vars(saved) if isinstance(saved, argparse.Namespace) else {}
    step = outer.get("steps")
    depth = sum(name.startswith("blocks.") and name.endswith("attn.qkv.weight") for name in state)
    return {_current_name(name, depth): t for name, t in state.items()}, step if type(step) is int and step >= 0 else 0, arguments


def _is_plain(t: Any) -> bool:
    """Return whether t is a dense floating-point tensor whose elements all lie in the file."""
    dense = isinstance(t, Tensor) and t.is_floating_point() and t.layout == torch.strided and t.device.type == "cpu"
    return dense and t.numel() * t.element_size() <= t.untyped_storage().nbytes()


def _current_name(name: str, depth: int) -> str:
    """Return the name of a tensor in REPA's code of today: at first, blocks after the projectors' were decoder_blocks.0, 1, …"""
    return re.sub(r"^decoder_blocks\.(\d{1,3})\.", lambda match: f"blocks.{depth + int(match[1])}.", name)


def _shapes(config: ModelConfig, outputs: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the published tensors by name. outputs: output channels."""
    H, F, p = config.width, config.hidden, config.patch_size
    linears = {
        "t_embedder.mlp.0": (H, TIME_FEATURES), "t_embedder.mlp.2": (H, H), f"final_layer.{MODULATION}": (2 * H, H),
        "final_layer.linear": (outputs * p * p, H),
    }  # fmt: skip
    for block in (f"blocks.{i}." for i in range(config.depth)):
        sizes = {"attn.qkv": (3 * H, H), "attn.proj": (H, H), "mlp.fc1": (F, H), "mlp.fc2": (H, F), MODULATION: (6 * H, H)}
        linears |= {block + name: size for name, size in sizes.items()}
    return {
        "pos_embed": (1, (config.input_size // p) ** 2, H),
        "x_embedder.proj.weight": (H, config.in_channels, p, p),
        "x_embedder.proj.bias": (H,),
        "y_embedder.embedding_table.weight": (config.num_classes + 1, H),
        **{f"{name}.weight": size for name, size in linears.items()},
        **{f"{name}.bias": size[:1] for name, size in linears.items()},
    }


def model_config(sit: dict[str, Tensor], file: Path) -> tuple[ModelConfig, int]:
    """Return the ModelConfig that the shapes of published tensors tell, and the number of output channels.

    Raises InputError if they are not those of a published size, the first difference in its sentence.
    """
    for name, axes in (("x_embedder.proj.weight", 4), ("y_embedder.embedding_table.weight", 2), ("pos_embed", 3)):
        if name not in sit or sit[name].ndim != axes:
            raise InputError(f"{file} is not a SiT: it has no tensor {name} of {axes} dimensions")
    H, C, p, _ = sit["x_embedder.proj.weight"].shape
    blocks = [match[1] for name in sit if (match := re.match(r"blocks\.(\d{1,3})\.", name))]
    depth = 1 + max(map(int, blocks), default=-1)
    if (H, depth) not in PUBLISHED:
        sizes = ", ".join(f"{L} of {width} ({name})" for (width, L), name in PUBLISHED.items())
        raise InputError(f"{file} holds {depth} blocks of width {H}, but the published SiT models have {sizes}")
    if C != LATENT_CHANNELS:
        raise InputError(f"{file} takes {C} channels, but the latents of SiT's autoencoder have {LATENT_CHANNELS}")
    side = math.isqrt(sit["pos_embed"].shape[1])
    values = {
        "preset": PUBLISHED[H, depth], "patch_size": p, "in_channels": C, "input_size": side * p,
        "num_classes": len(sit["y_embedder.embedding_table.weight"]) - 1,
    }  # fmt: skip
    config = from_dict({"model": values}).model
    double = sit.get("final_layer.linear.bias", torch.empty(0)).numel() == 2 * C * p * p
    shapes = _shapes(config, outputs := 2 * C if double else C)
    for name, shape in shapes.items():
        if name not in sit:
            raise InputError(f"{file} is not a {config.preset}: it has no tensor {name}")
        if sit[name].shape != shape:
            raise InputError(f"{file} is not a {config.preset}: {name} has the shape {list(sit[name].shape)}, not {list(shape)}")
    if unknown := sorted(sit.keys() - shapes.keys()):
        raise InputError(f"{file} is not a {config.preset}, which has no tensor {unknown[0]!r}: it is another network")
    return config, outputs


def _timestep_of_data(file: Path, given: int | None, projectors: bool, outputs: int, arguments: dict) -> int:
    """Return the timestep at which the network sees data without noise: SiT's 1 or REPA's 0.

    Raises InputError if settings of training name another model or path, or nothing tells SiT from REPA.
    """
    known = {"model": "sit", "path_type": "linear", "prediction": "v"}
    for key, start in known.items():
        if not str(arguments.get(key, start)).lower().startswith(start):
            raise InputError(
                f"{file} was trained with {key}={arguments[key]}, but only SiT models with linear paths and velocities fit"
            )
    if given is not None:
        return given
    if projectors or outputs > LATENT_CHANNELS:
        return 0 if projectors else 1
    raise InputError(
        f"{file} has {outputs} output channels and no projectors, which may be SiT or REPA: give --data-at 1 if its data are at "
        "t = 1, as in SiT, or --data-at 0, as in REPA"
    )


def convert(sit: dict[str, Tensor], config: ModelConfig, data_at: int) -> dict[str, Tensor]:
    """Return the state_dict of a DiT from published tensors, of which it is a linear function.

    data_at: 1 if the network has SiT's timesteps and sign of the velocity, 0 if it has ours. Products are computed in fp64.
    """
    p, C = config.patch_size, config.in_channels
    time, sign = sit["t_embedder.mlp.0.weight"], 1 - 2 * data_at
    if data_at:
        # Features of 1 − t from those of t: cos(f − ft) = cos f·cos ft + sin f·sin ft, sin(f − ft) = sin f·cos ft − cos f·sin ft.
        frequencies = TimeEmbedding(config).frequencies.double()
        cos, sin = time.double().chunk(2, dim=1)
        c, s = frequencies.cos(), frequencies.sin()
        time = torch.cat((cos * c + sin * s, cos * s - sin * c), dim=1)
    out = {
        "patch_embedding.weight": sit["x_embedder.proj.weight"].flatten(1),
        "patch_embedding.bias": sit["x_embedder.proj.bias"],
        "time_embedding.map.0.weight": time,
        "time_embedding.map.0.bias": sit["t_embedder.mlp.0.bias"],
        "class_embedding.table.weight": sit["y_embedder.embedding_table.weight"],
    }
    for part in ("weight", "bias"):
        out[f"time_embedding.map.2.{part}"] = sit[f"t_embedder.mlp.2.{part}"]
        out[f"final_modulation.{part}"] = sit[f"final_layer.{MODULATION}.{part}"]
        by_pixel = sit[f"final_layer.linear.{part}"].unflatten(0, (p, p, -1))[:, :, :C]  # the other channels are not used
        out[f"output.{part}"] = sign * by_pixel.movedim(2, 0).flatten(0, 2)
        for i in range(config.depth):
            for ours, theirs in LINEARS.items():
                out[f"blocks.{i}.{ours}.{part}"] = sit[f"blocks.{i}.{theirs}.{part}"]
        last = 0
        for group, size in enumerate(config.group_sizes):
            first, last = last, last + size
            names = [f"blocks.{i}.{MODULATION}.{part}" for i in range(first, last)]
            out[f"modulation.{group}.{part}"] = torch.cat([sit[name] for name in names])
    if config.positions == "absolute":
        out["positions"] = sit["pos_embed"][0]
    return {name: t.float() for name, t in out.items()}


@torch.no_grad()
def check_velocity(config: ModelConfig, weights: dict[str, Tensor], data_at: int, file: Path) -> str:
    """Return a line on what the model answers to noise. Raises InputError if it predicts noise, as DiT does, or is not finite.

    At t = 1 the best velocity is the noise minus a mean: that of a trained model is close to its input. A model that predicts the
    noise of 1000 steps takes every t in [0,1] for one of the first two, and answers with its input at the last step, 999.
    """
    with torch.device("meta"):
        model = DiT(config)
    model.load_state_dict(weights, assign=True)
    model.float()  # computes the tables, which were on the meta device
    x = torch.randn(1, config.in_channels, config.input_size, config.input_size, generator=torch.Generator().manual_seed(0))
    last = 1.0 - LAST_STEP if data_at else LAST_STEP
    v = model(x.expand(2, -1, -1, -1), torch.tensor([1.0, last]), torch.full((2,), config.num_classes))
    if not v.isfinite().all():
        raise InputError(f"{file} is damaged: a velocity of its model is not finite")
    flow, diffusion = torch.cosine_similarity(v.flatten(1), x.flatten(1)).tolist()
    if (1 - 2 * data_at) * diffusion > max(0.9, flow):
        raise InputError(
            f"{file} predicts the noise of 1000 diffusion steps, as DiT does: it is no flow model, although the names fit"
        )
    if flow > 0.5:
        return f"check: at t = 1 the velocity is the noise minus a mean, as a trained model's is (cosine {flow:.2f})"
    return f"warning: at t = 1 the velocity is not the noise minus a mean, as a trained model's is (cosine {flow:.2f})"


def load(file: Path, data_at: int | None = None) -> Imported:
    """Return the SiT or REPA in a file that torch.save wrote. data_at: as in `convert`; None: what the file tells.

    Raises InputError if the file cannot be read, holds another network, or does not tell SiT from REPA.
    """
    sit, step, arguments = split(files.read(file), file)
    projectors = sorted(name for name in sit if name.startswith("projectors."))
    for name in projectors:
        del sit[name]
    config, outputs = model_config(sit, file)
    data_at = _timestep_of_data(file, data_at, bool(projectors), outputs, arguments)
    table = fixed_positions(config)
    assert table is not None  # every preset of SiT has one
    error = (sit["pos_embed"][0].float() - table).abs().max().item()
    size, origin = PIXELS_PER_LATENT * config.input_size, "SiT" if data_at else "REPA"
    notes = [f"model: {config.preset} for {size} pixels and {config.num_classes} classes, data at t = {data_at} as in {origin}"]
    if projectors:
        notes.append(f"left out: {len(projectors)} tensors of REPA's projectors, which only its training uses")
    if not error < SAME_POSITIONS:
        config = replace(config, positions="absolute")
        notes.append(f"positions: up to {error:.2g} from the sine-cosine table, so they are taken as learned ones")
    weights = convert(sit, config, data_at)
    notes.append(check_velocity(config, weights, data_at, file))
    return Imported(config, weights, step, notes)


def import_run(file: Path, data_at: int | None, out: Path) -> tuple[Path, list[str]]:
    """Write a SiT or REPA checkpoint as the run `out`, with the SD-VAE of its training by its Hub id.

    Returns the checkpoint's folder and lines for the user. Raises InputError for bad files or if `out` holds checkpoints already,
    before anything is written.
    """
    files.refuse_taken(out)
    config, weights, step, notes = load(file, data_at)
    run = Config(
        model=config,
        data=DataConfig(source=str(file), image_size=PIXELS_PER_LATENT * config.input_size, autoencoder=PUBLISHED_VAE),
        train=TrainConfig(precision="fp32"),  # as SiT is sampled
    )
    return files.write(out, weights, run, step, file.name), notes
