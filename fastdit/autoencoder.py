"""Latent codecs: images to latents and back. B batch size, S image size in pixels, c and s latent channels and size.

Images are fp32 [B,3 or 1,S,S] in [-1,1]. A codec encodes them to moments, which describe the distribution of their latents; a
posterior sample of moments is latents fp32 [B,c,s,s] in the scale that the model is trained in.
"""

import hashlib
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.config import DataConfig, InputError, ModelConfig

DECODE_BATCH = 8  # images: SD-VAE's decoder keeps some 0.25 GB of activations per image of 256 pixels in fp32
COMPILE_MIN_IMAGES = 64  # in one call: fewer are decoded sooner than the decoder is compiled, which takes a minute


class Codec(Protocol):
    """What training, sampling and evaluation need of an autoencoder. Its weights are frozen."""

    channels: int  # of latents, c
    size: int  # of latents, s
    image_channels: int  # of decoded images; an autoencoder also encodes grey images, as RGB
    needs_noise: bool  # False: `posterior_sample` ignores its noise
    dtype: torch.dtype | None  # of the weights, None without weights

    def sha256(self) -> str | None:
        """Return a hash of the weights as they were loaded, None without weights."""

    def about(self) -> dict:
        """Return what a latent set records of the codec, as JSON types: "autoencoder_sha256" and the latents' scale."""

    def encode(self, images: Tensor) -> Tensor:
        """Return the moments [B,...] of images fp32 [B,C,S,S] in [-1,1]."""

    def posterior_sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Return latents fp32 [B,c,s,s], a function of moments [B,...] and standard normal noise fp32 [B,c,s,s]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return images fp32 [B,image_channels,S,S], clamped to [-1,1], of latents [B,c,s,s]."""

    def for_encoding(self, dtype: torch.dtype) -> "Codec":
        """Set the codec up to encode many images in `dtype` and return it."""

    def for_decoding(self, dtype: torch.dtype) -> "Codec":
        """Set the codec up to decode many images in `dtype` and return it."""


class Pixels:
    """No autoencoder: moments, latents and pixels are the same."""

    needs_noise = False
    dtype = None

    def __init__(self, channels: int, image_size: int) -> None:
        self.channels = channels
        self.image_channels = channels
        self.size = image_size

    def sha256(self) -> None:
        return None

    def about(self) -> dict:
        return {"autoencoder_sha256": None}

    def encode(self, images: Tensor) -> Tensor:
        return images

    def posterior_sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().clamp(-1, 1)

    def for_encoding(self, dtype: torch.dtype) -> "Pixels":
        return self

    def for_decoding(self, dtype: torch.dtype) -> "Pixels":
        return self


class KL:
    """A diffusers AutoencoderKL such as SD-VAE, frozen. Moments are [B,2,c,s,s], the mean and log-variance of a normal posterior;
    latents are (posterior sample − shift)·scaling factor, both constants from the autoencoder's config."""

    image_channels = 3
    needs_noise = True

    def __init__(self, source: str, image_size: int, device: torch.device, vae=None) -> None:
        """source: a local folder or a hub id. vae: the AutoencoderKL if it is already loaded.

        Raises InputError if there is no such autoencoder or it cannot encode images of this size.
        """
        from diffusers import AutoencoderKL

        try:
            vae = vae or AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False)
        except (OSError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            raise InputError(f"data.autoencoder={source} is neither 'pixels' nor a diffusers AutoencoderKL: {first}") from error
        self.vae = vae.float().to(device).requires_grad_(False).eval()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if image_size % factor:
            raise InputError(f"data.image_size={image_size} must be a multiple of {factor}, the downsampling factor of {source}")
        self.channels = vae.config.latent_channels
        self.size = image_size // factor
        self.scale = vae.config.scaling_factor
        self.shift = vae.config.get("shift_factor") or 0.0
        self.may_compile_decoder = False
        self.decoder_is_compiled = False
        self._sha256: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    def sha256(self) -> str:
        """Return a hash of the fp32 weights as they were loaded."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.vae.state_dict().items()):
                digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
            self._sha256 = digest.hexdigest()
        return self._sha256

    def about(self) -> dict:
        return {"autoencoder_sha256": self.sha256(), "scaling_factor": self.scale, "shift": self.shift}

    def _cast(self, dtype: torch.dtype) -> None:
        """Cast the weights to `dtype`, channels last."""
        if dtype != torch.float32:
            self.sha256()  # computed and kept now, because it is a hash of the fp32 weights
        self.vae = self.vae.to(dtype=dtype, memory_format=torch.channels_last)

    def for_encoding(self, dtype: torch.dtype) -> "KL":
        """Use `dtype`, channels last, and compile the encoder on CUDA; return the codec."""
        self._cast(dtype)
        if self.vae.device.type == "cuda":
            self.vae.encoder.compile(dynamic=False)
        return self

    def for_decoding(self, dtype: torch.dtype) -> "KL":
        """Use `dtype`, channels last; on CUDA the first `decode` of many images compiles the decoder. Return the codec."""
        self._cast(dtype)
        self.may_compile_decoder = self.vae.device.type == "cuda"
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return moments [B,2,c,s,s] in the dtype of the weights. Grey images are taken as RGB."""
        images = images.expand(-1, 3, -1, -1).to(self.vae.dtype)
        if self.vae.dtype == torch.bfloat16:  # torch's bf16 convolutions are fast in this layout only
            images = images.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(images).latent_dist
        return torch.stack((posterior.mean, posterior.logvar), dim=1)

    def posterior_sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Return mean + std·noise in the model's scale, fp32 [B,c,s,s]; moments [B,2,c,s,s] of any float dtype."""
        mean, logvar = moments.float().unbind(1)
        return (mean + torch.exp(0.5 * logvar) * noise - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images fp32 [B,3,S,S], clamped to [-1,1], decoded DECODE_BATCH at a time."""
        z = (latents / self.scale + self.shift).to(self.vae.dtype)
        if self.may_compile_decoder and not self.decoder_is_compiled and len(z) >= COMPILE_MIN_IMAGES:
            self.vae.decoder.compile(dynamic=False)
            self.decoder_is_compiled = True
        parts = z.split(DECODE_BATCH)
        if self.decoder_is_compiled:  # pad the last part: another shape would be compiled anew
            parts = (*parts[:-1], F.pad(parts[-1], (0, 0, 0, 0, 0, 0, 0, DECODE_BATCH - len(parts[-1]))))
        return torch.cat([self.vae.decode(part).sample.float().clamp(-1, 1) for part in parts])[: len(z)]


def create(source: str, image_size: int, image_channels: int, device: torch.device, vae=None) -> Codec:
    """Return the codec that data.autoencoder names: "pixels", or a folder or hub id of an AutoencoderKL.

    image_channels: channels of the images if they are the latents. vae: the AutoencoderKL if it is already loaded. Raises
    InputError if there is no such autoencoder. Another kind of autoencoder is one more case here.
    """
    if source == "pixels":
        return Pixels(image_channels, image_size)
    return KL(source, image_size, device, vae)


def load(
    data: DataConfig, model: ModelConfig, image_channels: int, device: torch.device, manifest: dict | None = None, vae=None
) -> Codec:
    """Return the codec of a run.

    image_channels: channels of the run's images. manifest: manifest of the latent set that the run trains on, None if it trains on
    images. vae: the AutoencoderKL if it is already loaded. Raises InputError if the codec does not fit the model, or is not the one
    that the latent set was encoded with.
    """
    if manifest and data.autoencoder == "pixels":
        raise InputError(
            f"data.source={data.source} holds latents: set data.autoencoder={manifest['autoencoder']}, which they were made with"
        )
    codec = create(data.autoencoder, data.image_size, image_channels, device, vae)
    if manifest and codec.sha256() != manifest["autoencoder_sha256"]:
        raise InputError(
            f"data.autoencoder={data.autoencoder} is not the one that the latents were made with, {manifest['autoencoder']} "
            f"(SHA-256 {manifest['autoencoder_sha256'][:12]}…): set data.autoencoder to that one, or encode again"
        )
    if (codec.channels, codec.size) != (model.in_channels, model.input_size):
        raise InputError(
            f"data.autoencoder={data.autoencoder} makes {codec.channels} channels of {codec.size}x{codec.size} from "
            f"{data.image_size}-px images: set model.in_channels={codec.channels} and model.input_size={codec.size}"
        )
    return codec
