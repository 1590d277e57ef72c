"""Checkpoints of the published base model, converted into the layout of DiT: the same function, computed faster.

A base checkpoint is two files, model_Ns.pkl (a state_dict) and model_params_Ns.json. D head dim.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.config import Config, DataConfig, InputError, ModelConfig, TrainConfig
from fastdit.convert import files
from fastdit.files import json_object
from fastdit.model import DiT

POSITION_TABLE_SIDE = 256  # rows and columns of the base model's position table, of which it uses the centre
PUBLISHED_VAE = "stabilityai/sd-vae-ft-ema"  # autoencoder of the base model, for checkpoints that do not contain it
# The small modulation Linears of a block, in the order in which DiT.modulation packs them.
MODULATION = ("norm1.c_shift", "norm1.c_scale", "scale1", "norm2.c_shift", "norm2.c_scale", "scale2")
POSITIONS = {"absolute": "absolute", "RoPE": "rope_1d"}


def model_config(parameters: dict, input_size: int) -> ModelConfig:
    """Return the ModelConfig of the contents of model_params_Ns.json.

    Raises KeyError for a missing parameter and InputError for a value out of range.
    """
    return ModelConfig(
        preset="base/2",
        width=parameters["dim"],
        depth=parameters["num_blocks"],
        heads=parameters["num_heads"],
        hidden=int(parameters["dim"] * parameters["hidden_scale"]),
        patch_size=parameters["patch_size"],
        in_channels=parameters["inCh"],
        input_size=input_size,
        num_classes=parameters["num_classes"],
        class_width=parameters["c_dim"],
        positions=POSITIONS[parameters["positional_encoding"]],
        qk_norm="full_width" if parameters.get("legacy_norm", False) else "head",
        time_embedding="base",
        zero_init_gates=False,
    )


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows [heads·D,...] from interleaved rotary pairs (2j, 2j+1) of each head to half-split ones (j, j + D/2)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def convert(base: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the state_dict of a DiT from that of a base model, whose VAE.* part is ignored.

    The two linear maps of the base model's patch embedding become one, and its position table is mapped by the second; both
    products are computed in fp64. The row of the null class is zero, as in the base model. Raises KeyError for a missing tensor.
    """
    rope = config.positions != "absolute"
    embed = base["patch_emb.weight"].double()
    out = {
        "patch_embedding.weight": (embed @ base["pos_enc.proj.weight"].double().flatten(1)).float(),
        "patch_embedding.bias": base["patch_emb.bias"],
        "time_embedding.map.weight": base["t_emb2.weight"],
        "class_embedding.table.weight": F.pad(base["c_emb.weight"].T, (0, 0, 0, 1)),
        "class_embedding.map.weight": base["cond_MLP.weight"],
        "class_embedding.map.bias": base["cond_MLP.bias"],
        "output.weight": base["out_proj.weight"],
        "output.bias": base["out_proj.bias"],
    }
    if not rope:
        side = config.input_size // config.patch_size
        first = (POSITION_TABLE_SIDE - side) // 2
        table = base["pos_enc.pos_embed"].view(POSITION_TABLE_SIDE, POSITION_TABLE_SIDE, -1)
        crop = table[first : first + side, first : first + side].flatten(0, 1)
        out["positions"] = (crop.double() @ embed.T).float()
    for i in range(config.depth):
        block = f"blocks.{i}."
        q, k = base[block + "attn.query_proj.weight"], base[block + "attn.key_proj.weight"]
        norms = [base[block + f"attn.{name}_norm.weight"] for name in "qk"]
        if rope:
            q, k = half_split(q, config.heads), half_split(k, config.heads)
            norms = [half_split(norm, config.heads if config.qk_norm == "full_width" else 1) for norm in norms]
        out[block + "attention.qkv.weight"] = torch.cat((q, k, base[block + "attn.value_proj.weight"]))
        out[block + "attention.q_weight"], out[block + "attention.k_weight"] = norms
        out[block + "attention.out.weight"] = base[block + "attn.out_proj.weight"]
        for ours, theirs in (("up", "lin_up"), ("down", "lin_down")):
            for part in ("weight", "bias"):
                out[block + f"mlp.{ours}.{part}"] = base[block + f"MLP.{theirs}.{part}"]
    return out | _modulations(base, config)


def _modulations(base: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the base model's six small Linears per block, packed into the groups of DiT.modulation."""
    out, first = {}, 0
    for group, blocks in enumerate(config.group_sizes):
        for part in ("weight", "bias"):
            names = [f"blocks.{i}.{v}.{part}" for i in range(first, first + blocks) for v in MODULATION]
            out[f"modulation.{group}.{part}"] = torch.cat([base[name] for name in names])
        first += blocks
    for part in ("weight", "bias"):
        out[f"final_modulation.{part}"] = torch.cat([base[f"out_norm.{v}.{part}"] for v in ("c_shift", "c_scale")])
    return out


def load(file: Path, parameters_file: Path, input_size: int = 32) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Return the config, the converted state_dict and the autoencoder's state_dict (empty if there is none) of a base checkpoint.

    Code in the pickle is never run. Raises InputError if a file is missing or damaged, contains code, or does not contain the model
    that the JSON describes.
    """
    try:
        parameters = json_object(parameters_file.read_bytes())
        config = model_config(parameters, input_size)
    except OSError as error:
        raise InputError(f"base checkpoint parameters {parameters_file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{parameters_file} is not a base model's parameter file: {error!r}") from error
    base = files.read(file)
    try:
        weights = convert(base, config)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{file} does not hold the model that {parameters_file.name} describes: {error}") from error
    with torch.device("meta"):
        expected = {name: p.shape for name, p in DiT(config).named_parameters()}
    wrong = [name for name in expected if expected[name] != weights[name].shape]
    if wrong:
        raise InputError(f"{file} does not hold the model that {parameters_file.name} describes: {wrong[0]} has another shape")
    return config, weights, {key.removeprefix("VAE."): t for key, t in base.items() if key.startswith("VAE.")}


def beside(file: Path) -> Path:
    """Return the default path of the parameters of model_Ns.pkl: model_params_Ns.json in the same folder."""
    return file.with_name(file.stem.replace("model_", "model_params_", 1) + ".json")


def load_run(file: Path, parameters_file: Path | None, vae_folder: Path | None = None):
    """Return the Config, the converted weights, the step and the AutoencoderKL (None if there is none) of a base checkpoint.

    parameters_file: path of the JSON (default: `beside(file)`); vae_folder: folder that the Config names as the autoencoder's,
    if the caller saves it. Raises InputError.
    """
    parameters_file = parameters_file or beside(file)
    model, weights, vae_weights = load(file, parameters_file)
    vae = _autoencoder(vae_weights, file) if vae_weights else None
    source = str((vae_folder or file).absolute()) if vae else PUBLISHED_VAE
    config = Config(
        model=model,
        data=DataConfig(source=str(file), image_size=8 * model.input_size, autoencoder=source),
        train=TrainConfig(precision="fp32"),  # as the base model is sampled
    )
    return config, weights, json_object(parameters_file.read_bytes()).get("start_step", 0), vae


def import_run(file: Path, parameters_file: Path | None, out: Path) -> Path:
    """Write a base checkpoint as the run `out`, with its autoencoder as out/autoencoder.

    Returns the checkpoint's folder. Raises InputError for bad files or if `out` holds checkpoints already, before anything is
    written.
    """
    files.refuse_taken(out)
    config, weights, step, vae = load_run(file, parameters_file, out / "autoencoder")
    return files.write(out, weights, config, step, file.name, vae)


def _autoencoder(weights: dict[str, Tensor], file: Path):
    """Return the SD-VAE whose weights a base checkpoint contains. Raises InputError if they are another autoencoder's."""
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {  # not as plain arguments: diffusers annotates these as tuples of one element
        "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    with torch.device("meta"):
        vae = AutoencoderKL(layers_per_block=2, latent_channels=4, scaling_factor=0.18215, sample_size=256, **blocks)
    try:
        vae.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"the VAE.* weights in {file} are not those of sd-vae-ft-ema: {str(error).splitlines()[1].strip()}"
        ) from error
    return vae
