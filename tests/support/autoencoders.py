"""A tiny random AutoencoderKL of the SD-VAE's kind: 4 latent channels, half of the image's size."""

from pathlib import Path

import torch


def tiny(folder: Path, seed: int = 0) -> Path:
    """Save one in a folder, and return the folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[4, 8], norm_num_groups=4, latent_channels=4, scaling_factor=0.5, **blocks)
    vae.save_pretrained(folder)
    return folder
