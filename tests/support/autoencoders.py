"""A tiny random AutoencoderKL of the SD-VAE's kind: 4 latent channels, half of the image's size; a codec without weights."""

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
