"""Latent codecs: what the model sees of an image. B batch, S image size in pixels, c/s latent channels and size.

Images are fp32 [B,3 or 1,S,S] in [-1,1]; latents fp32 [B,c,s,s] in the model's own scale.
"""

import torch
from torch import Tensor

from fastdit.config import DataConfig, InputError, ModelConfig


class Pixels:
    """No autoencoder: latents are the pixels."""

    def __init__(self, channels: int, image_size: int) -> None:
        self.channels, self.size = channels, image_size
        self.needs_noise = False

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().clamp(-1, 1)


class KL:
    """A diffusers AutoencoderKL (SD-VAE and its kin), frozen: z = (posterior sample − shift)·scaling factor."""

    def __init__(self, source: str, image_size: int, device: torch.device) -> None:
        """source: a local folder or a hub id. Raises InputError when it cannot be loaded."""
        from diffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False)
        except (OSError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            raise InputError(f"data.autoencoder={source} is neither 'pixels' nor a diffusers AutoencoderKL: {first}") from error
        self.vae = vae.to(device).requires_grad_(False).eval()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if image_size % factor:
            raise InputError(f"data.image_size={image_size} must be a multiple of {factor}, the factor of {source}")
        self.channels, self.size = vae.config.latent_channels, image_size // factor
        self.scale, self.shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        self.needs_noise = True

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """A posterior sample, mean + std·noise; noise fp32 [B,c,s,s]. Grey images are taken as RGB."""
        posterior = self.vae.encode(images.expand(-1, 3, -1, -1).to(self.vae.dtype)).latent_dist
        return (posterior.mean.float() + posterior.std.float() * noise - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1,1], clamped."""
        return self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample.float().clamp(-1, 1)


def load(data: DataConfig, model: ModelConfig, image_channels: int, device: torch.device) -> Pixels | KL:
    """The codec of a run. Raises InputError when it does not fit the model's input."""
    if data.autoencoder == "pixels":
        codec = Pixels(image_channels, data.image_size)
    else:
        codec = KL(data.autoencoder, data.image_size, device)
    if (codec.channels, codec.size) != (model.in_channels, model.input_size):
        raise InputError(
            f"data.autoencoder={data.autoencoder} makes {codec.channels} channels of {codec.size}x{codec.size} from "
            f"{data.image_size}-px images: set model.in_channels={codec.channels} and model.input_size={codec.size}"
        )
    return codec
