"""Latent codecs: what the model sees of an image. B batch, S image size in pixels, c/s latent channels and size.

Images are fp32 [B,3 or 1,S,S] in [-1,1]; latents fp32 [B,c,s,s] in the model's own scale.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.config import DataConfig, InputError, ModelConfig

DECODED_AT_ONCE = 8  # SD-VAE's decoder keeps some 0.25 GB of activations for an image of 256 pixels in fp32
COMPILED_FROM = 64  # images in one call: fewer are decoded sooner than the decoder is compiled, which takes a minute


class Pixels:
    """No autoencoder: latents are the pixels."""

    def __init__(self, channels: int, image_size: int) -> None:
        self.channels, self.size = channels, image_size
        self.needs_noise = False

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        return images

    def for_encoding(self, dtype: torch.dtype) -> "Pixels":
        return self

    def for_decoding(self, dtype: torch.dtype) -> "Pixels":
        return self

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().clamp(-1, 1)


class KL:
    """A diffusers AutoencoderKL (SD-VAE and its kin), frozen: z = (posterior sample − shift)·scaling factor."""

    def __init__(self, source: str, image_size: int, device: torch.device, vae=None) -> None:
        """source: a local folder or a hub id; vae: the AutoencoderKL where it has been loaded. Raises InputError."""
        from diffusers import AutoencoderKL

        try:
            vae = vae or AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False)
        except (OSError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            raise InputError(f"data.autoencoder={source} is neither 'pixels' nor a diffusers AutoencoderKL: {first}") from error
        self.vae = vae.float().to(device).requires_grad_(False).eval()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if image_size % factor:
            raise InputError(f"data.image_size={image_size} must be a multiple of {factor}, the factor of {source}")
        self.channels, self.size = vae.config.latent_channels, image_size // factor
        self.scale, self.shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        self.needs_noise = True
        self.may_compile_decoder = self.decoder_is_compiled = False
        self._sha256: str | None = None

    def sha256(self) -> str:
        """A hash of the weights as they were loaded, in fp32."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.vae.state_dict().items()):
                digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
            self._sha256 = digest.hexdigest()
        return self._sha256

    def _cast(self, dtype: torch.dtype) -> None:
        """Cast to `dtype`, channels last."""
        if dtype != torch.float32:
            self.sha256()  # now: it is of the fp32 weights
        self.vae = self.vae.to(dtype=dtype, memory_format=torch.channels_last)

    def for_encoding(self, dtype: torch.dtype) -> "KL":
        """The same, set up to encode many images: in `dtype`, channels last, compiled on CUDA."""
        self._cast(dtype)
        if self.vae.device.type == "cuda":
            self.vae.encoder.compile(dynamic=False)
        return self

    def for_decoding(self, dtype: torch.dtype) -> "KL":
        """The same, set up to decode many images: in `dtype`, channels last, on CUDA compiled by the first call of many."""
        self._cast(dtype)
        self.may_compile_decoder = self.vae.device.type == "cuda"
        return self

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """[B,2,c,s,s]: mean and log-variance of the posterior. Grey images are taken as RGB."""
        images = images.expand(-1, 3, -1, -1).to(self.vae.dtype)
        if self.vae.dtype == torch.bfloat16:  # torch's bf16 convolutions are fast in this layout only
            images = images.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(images).latent_dist
        return torch.stack((posterior.mean, posterior.logvar), dim=1)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """A posterior sample, mean + std·noise; noise fp32 [B,c,s,s]."""
        return self.draw(self.moments(images), noise)

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A posterior sample of moments [B,2,c,s,s] in the model's own scale; noise fp32 [B,c,s,s]."""
        mean, logvar = moments.float().unbind(1)
        return (mean + torch.exp(0.5 * logvar) * noise - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1,1], clamped."""
        z = (latents / self.scale + self.shift).to(self.vae.dtype)
        if self.may_compile_decoder and not self.decoder_is_compiled and len(z) >= COMPILED_FROM:
            self.vae.decoder.compile(dynamic=False)
            self.decoder_is_compiled = True
        parts = z.split(DECODED_AT_ONCE)
        if self.decoder_is_compiled:  # fill the last part up: another shape would be compiled anew
            parts = (*parts[:-1], F.pad(parts[-1], (0, 0, 0, 0, 0, 0, 0, DECODED_AT_ONCE - len(parts[-1]))))
        return torch.cat([self.vae.decode(part).sample.float().clamp(-1, 1) for part in parts])[: len(z)]


class CachedKL(KL):
    """The autoencoder of cached latents: what it is given to encode are moments already."""

    def __init__(self, source: str, manifest: dict, device: torch.device) -> None:
        """manifest: of the latents. Raises InputError when they were made with other weights."""
        super().__init__(source, manifest["image_size"], device)
        if self.sha256() != manifest["autoencoder_sha256"]:
            raise InputError(
                f"data.autoencoder={source} is not the one that the latents were made with, {manifest['autoencoder']} "
                f"(SHA-256 {manifest['autoencoder_sha256'][:12]}…): set data.autoencoder to that one, or encode again"
            )

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """A posterior sample; images: moments [B,2,c,s,s]."""
        return self.draw(images, noise)


def load(
    data: DataConfig, model: ModelConfig, image_channels: int, device: torch.device, manifest: dict | None = None, vae=None
) -> Pixels | KL:
    """The codec of a run; manifest: of the cached latents that it trains on; vae: the AutoencoderKL where it has been loaded.
    Raises InputError when it does not fit the model."""
    if data.autoencoder == "pixels" and manifest:
        raise InputError(
            f"data.source={data.source} holds latents: set data.autoencoder={manifest['autoencoder']}, which they were made with"
        )
    if data.autoencoder == "pixels":
        codec = Pixels(image_channels, data.image_size)
    elif manifest:
        codec = CachedKL(data.autoencoder, manifest, device)
    else:
        codec = KL(data.autoencoder, data.image_size, device, vae)
    if (codec.channels, codec.size) != (model.in_channels, model.input_size):
        raise InputError(
            f"data.autoencoder={data.autoencoder} makes {codec.channels} channels of {codec.size}x{codec.size} from "
            f"{data.image_size}-px images: set model.in_channels={codec.channels} and model.input_size={codec.size}"
        )
    return codec
