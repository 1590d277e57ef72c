"""What the suites read and decode: JPEGs in an archive of ImageNet's format, and a random autoencoder of SD-VAE's size."""

from pathlib import Path

import torch

from benchmarks import photographs
from fastdit.data import prepare
from fastdit.data.index import Index, open_index

CLASSES = 10


def archive(folder: Path, count: int) -> Index:
    """Write `count` JPEGs of about 500x375 pixels, cut from real photographs, quality 90, and return an index of them."""
    classes: dict[str, dict[str, bytes]] = {f"n{i:08d}.tar": {} for i in range(CLASSES)}
    for i, image in enumerate(photographs.crops(count)):
        classes[f"n{i % CLASSES:08d}.tar"][f"{i}.JPEG"] = photographs.encoded(image)
    path = folder / "images.tar"
    path.write_bytes(photographs.tar_of({name: photographs.tar_of(files) for name, files in classes.items()}))
    return open_index(prepare.prepare([path], folder / "images.index"))


def autoencoder():
    """Return a frozen diffusers AutoencoderKL of SD-VAE's architecture with weights of one seed: the same in every process."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, scaling_factor=0.18215,
            sample_size=256, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    return vae.requires_grad_(False).eval()
