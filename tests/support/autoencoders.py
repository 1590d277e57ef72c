"""Tiny random autoencoders of diffusers, saved in a folder: of each class that fastdit reads, and changes to their files; a codec
without weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastdit.autoencoder import import_diffusers

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny(folder: Path, seed: int = 0, **settings) -> Path:
    """Save an AutoencoderKL of the SD-VAE's kind, with 4 latent channels and half of the image's size, and return the folder."""
    blocks = {"block_out_channels": [4, 8], "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.5, **settings}
    depth = len(blocks["block_out_channels"])
    blocks |= {"down_block_types": ["DownEncoderBlock2D"] * depth, "up_block_types": ["UpDecoderBlock2D"] * depth}
    return save("AutoencoderKL", folder, seed, **blocks)


def f16d32(folder: Path, seed: int = 0) -> Path:
    """An AutoencoderKL of VA-VAE's kind: 32 latent channels with means and standard deviations, a 16th of the image's size."""
    channels = [4] * 4 + [8]
    mean, std = [0.1 * i for i in range(32)], [0.5 + 0.05 * i for i in range(32)]
    given = {"latents_mean": mean, "latents_std": std, "scaling_factor": 1.0, "layers_per_block": 1}
    return tiny(folder, seed, block_out_channels=channels, latent_channels=32, mid_block_add_attention=False, **given)


def dc(folder: Path, seed: int = 0, depth: int = 2, latent_channels: int = 8) -> Path:
    """An AutoencoderDC of the SANA's kind, deterministic; its latents have image size / 2**(depth - 1)."""
    widths = [max(8, 2 * latent_channels // 4**i) for i in reversed(range(depth))]
    layers = [1] * depth
    given = {f"{side}_block_out_channels": widths for side in ("encoder", "decoder")}
    given |= {f"{side}_layers_per_block": layers for side in ("encoder", "decoder")}
    given |= {f"{side}_qkv_multiscales": [[]] * depth for side in ("encoder", "decoder")}
    return save("AutoencoderDC", folder, seed, latent_channels=latent_channels, attention_head_dim=8, scaling_factor=0.4, **given)


def distilled(folder: Path, seed: int = 0) -> Path:
    """An AutoencoderTiny of TAESD's kind, deterministic, with 4 latent channels and half of the image's size."""
    widths = {f"{side}_block_out_channels": [8, 8] for side in ("encoder", "decoder")}
    return save("AutoencoderTiny", folder, seed, num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1], **widths)


def representation(folder: Path, seed: int = 0) -> Path:
    """An AutoencoderRAE with a small MAE, deterministic: 64 channels of 4x4 with statistics, only for 32-pixel images."""
    small = {"encoder_type": "mae", "encoder_hidden_size": 64, "encoder_patch_size": 8, "encoder_num_hidden_layers": 1}
    small |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    small |= {"decoder_intermediate_size": 64, "patch_size": 8, "encoder_input_size": 32, "scaling_factor": 0.7}
    mean, std = torch.linspace(-1, 1, 64).view(64, 1, 1).tolist(), torch.linspace(0.5, 2, 64).view(64, 1, 1).tolist()
    return save("AutoencoderRAE", folder, seed, latents_mean=mean, latents_std=std, **small)


def save(name: str, folder: Path, seed: int = 0, **settings) -> Path:
    """Save an autoencoder of a class of diffusers with random weights, and return the folder."""
    torch.manual_seed(seed)
    getattr(import_diffusers(), name)(**settings).save_pretrained(folder)
    return folder


class Enlarged:
    """A codec without weights: the first three channels, each element as 8x8 pixels."""

    channels, image_channels, dtype, needs_noise = 4, 3, None, False

    def __init__(self, size: int) -> None:
        self.size = size

    def sha256(self):
        return None

    def for_decoding(self, dtype):
        return self

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)


def configure(folder: Path, **settings) -> None:
    """Change entries of an autoencoder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_weights(folder: Path, change) -> None:
    """Replace the weights by what change(weights) returns."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
