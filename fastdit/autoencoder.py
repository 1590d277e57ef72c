"""Latent codecs: images to latents and back. B batch size, S image size in pixels, c and s latent channels and size.

Images are fp32 [B,3 or 1,S,S] in [-1,1]. A codec encodes them to moments, which describe the distribution of their latents; a
posterior sample of moments is latents fp32 [B,c,s,s] in the scale that the model is trained in.

`read` loads an autoencoder of diffusers whole or not at all, and CODECS says what each of its classes computes.
"""

import hashlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.autoencoder_files import locate
from fastdit.config import DataConfig, InputError, ModelConfig
from fastdit.distributed import World
from fastdit.files import json_object
from fastdit.hub import first_line

DECODE_BATCH = 8  # images: SD-VAE's decoder keeps some 0.25 GB of activations per image of 256 pixels in fp32
COMPILE_MIN_IMAGES = 64  # in one call: fewer are decoded sooner than the decoder is compiled, which takes a minute
SCALE_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of an autoencoder's config.json
SCALE_ABOUT = ("scaling_factor", "shift", "latents_mean", "latents_std")  # entries of Codec.about()


class Codec(Protocol):
    """What training, sampling and evaluation need of an autoencoder. Its weights are frozen."""

    channels: int  # of latents, c
    size: int  # of latents, s
    image_channels: int  # of decoded images; an autoencoder also encodes grey images, as RGB
    needs_noise: bool  # False: `posterior_sample` ignores its noise

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the weights, None without weights."""
        ...

    def sha256(self) -> str | None:
        """Return a hash of the weights as they were loaded, None without weights."""
        ...

    def about(self) -> dict:
        """Return what a latent set records of the codec, as JSON types: "autoencoder_sha256" and the latents' scale."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Return the moments [B,...] of images fp32 [B,C,S,S] in [-1,1]."""
        ...

    def posterior_sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Return latents fp32 [B,c,s,s], a function of moments [B,...] and standard normal noise fp32 [B,c,s,s]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return images fp32 [B,image_channels,S,S], clamped to [-1,1], of latents [B,c,s,s]."""
        ...

    def for_encoding(self, dtype: torch.dtype) -> "Codec":
        """Set the codec up to encode many images in `dtype` and return it."""
        ...

    def for_decoding(self, dtype: torch.dtype) -> "Codec":
        """Set the codec up to decode many images in `dtype` and return it."""
        ...


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


def _class_name(folder: Path, source: str) -> tuple[str, dict]:
    """Return the class and the contents of an autoencoder's config.json. Raises InputError unless CODECS has the class."""
    try:
        config = json_object((folder / "config.json").read_bytes())
        name = config["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"autoencoder {source}: {folder / 'config.json'} does not name a class of diffusers: {error!r}") from error
    if str(name) not in CODECS:  # it may be anything
        raise InputError(f"autoencoder {source} is of the class {name}, which fastdit cannot use: give one of {', '.join(CODECS)}")
    return name, config


def import_diffusers():
    """Return the package diffusers.

    It imports transformers if that is installed, which imports a package `kernels` if there is one. In a checkout of fastdit, whose
    root is on sys.path under `python -m`, that would be the folder kernels/, and load its ops twice.
    """
    spec = importlib.util.find_spec("kernels")
    if spec and spec.origin and Path(spec.origin).parent == Path(__file__).resolve().parent.parent / "kernels":
        sys.modules["kernels"] = cast(Any, None)  # as if there were no such package
    import diffusers

    return diffusers


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from logging warnings: what it warns of is an error here, or of no interest."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def read(source: str):
    """Return a diffusers autoencoder, fp32 on the CPU, whose every parameter and buffer was read from its files.

    source: as in `locate`. Raises InputError if there is none, if its class is not in CODECS, or if its files are not whole.
    """
    folder, files = locate(source)
    name, config = _class_name(folder, source)
    if name == "AutoencoderRAE" and not importlib.util.find_spec("transformers"):
        raise InputError(f"autoencoder {source} is of the class {name}, which needs the package transformers: pip install it")
    diffusers = import_diffusers()
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise InputError(
            f"autoencoder {source} is of the class {name}, which diffusers {diffusers.__version__} lacks: install a newer one"
        )
    try:
        with _quiet():
            vae, info = kind.from_pretrained(
                folder, variant=files.variant, use_safetensors=files.safetensors, local_files_only=True,
                low_cpu_mem_usage=False, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # of any kind, by what is damaged
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if "size mismatch" in line), first_line(error))
        raise InputError(f"autoencoder {source} cannot be loaded from {folder}, download it again: {reason}") from error
    for problem, keys in (("lacks", info["missing_keys"]), ("holds", info["unexpected_keys"])):
        if keys:
            raise InputError(
                f"autoencoder {source} is not whole: its file of weights {problem} {min(keys)}"
                + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
                + ("" if problem == "lacks" else f", which an {name} of its config.json does not have")
                + ": download it again"
            )
    vae.register_to_config(**{key: config[key] for key in SCALE_KEYS if key in config})  # also those its class would ignore
    return vae


def _scale(vae, source: str) -> tuple[float | Tensor, float | Tensor, dict]:
    """Return shift, scale and their entries of `about`: latents are (z − shift)·scale, as in the pipelines of diffusers.

    Of an autoencoder with latents_mean and latents_std they are fp32 [c,1,1]: (z − mean)·scaling_factor/std, see
    pipeline_stable_diffusion_xl_img2img.py. Raises InputError for values that are not finite or could mean two things.
    """
    factor, shift, mean, std = (vae.config.get(key) for key in SCALE_KEYS)
    factor, shift = 1.0 if factor is None else factor, shift or 0.0
    about = {"scaling_factor": factor, "shift": shift}
    channels = vae.config.latent_channels
    if (mean is None) != (std is None) or (mean is not None and shift):
        raise InputError(
            f"autoencoder {source}: its config.json has latents_mean={mean}, latents_std={std} and shift_factor={shift}, which no "
            "pipeline of diffusers combines: set latents_mean and latents_std, or only shift_factor"
        )
    values = [factor, shift, *(mean or []), *(std or [])]
    finite = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    if not finite or any(value <= 0 for value in [factor, *(std or [])]):
        raise InputError(f"autoencoder {source}: a scale of its config.json is not finite and above 0: {values}")
    if mean is None or std is None:
        return shift, factor, about
    if not len(mean) == len(std) == channels:
        raise InputError(
            f"autoencoder {source}: its config.json has {len(mean)} latents_mean and {len(std)} latents_std for {channels} channels"
        )
    about |= {"latents_mean": list(mean), "latents_std": list(std)}
    constants = (torch.tensor(values, dtype=torch.float32, device=vae.device).view(-1, 1, 1) for values in (mean, std))
    return next(constants), factor / next(constants), about


class Frozen:
    """An autoencoder of diffusers with frozen weights: what its classes have in common.

    Latents are (z − shift)·scale of what the autoencoder calls z; both are constants, or fp32 [c,1,1], of its config.
    """

    image_channels = 3
    needs_noise = False

    def __init__(self, source: str, image_size: int, device: torch.device, vae=None) -> None:
        """source: as in `locate`; vae: the autoencoder if it is already loaded.

        Raises InputError if there is no such autoencoder or it cannot encode images of this size.
        """
        loaded: Any = vae or read(source)  # what diffusers annotates as a dict or a tuple has the attributes used here
        self.source = source
        self.vae = loaded.float().to(device).requires_grad_(False).eval()
        self.shift, self.scale, self._about = self._read_scale()
        self.channels, self.size = self._probe(image_size)
        self.may_compile_decoder = False
        self.decoder_is_compiled = False
        self._sha256: str | None = None

    def _read_scale(self) -> tuple[float | Tensor, float | Tensor, dict]:
        return _scale(self.vae, self.source)

    def _factor(self) -> int:
        """Return the downsampling factor, image size / latent size."""
        raise NotImplementedError

    def _to_moments(self, images: Tensor) -> Tensor:
        """Return moments of images [B,3,S,S] in the dtype of the weights."""
        raise NotImplementedError

    def _to_images(self, z: Tensor) -> Tensor:
        """Return images [B,3,S,S] of z [B,c,s,s] in the dtype of the weights."""
        return self.vae.decode(z).sample

    def _check_size(self, image_size: int) -> None:
        """Raise InputError unless the autoencoder takes images of this size."""
        factor = self._factor()
        if image_size % factor:
            raise InputError(
                f"data.image_size={image_size} must be a multiple of {factor}, the downsampling factor of {self.source}"
            )

    def _probe(self, image_size: int) -> tuple[int, int]:
        """Return the latents' channels and size, from a forward pass without data. Raises InputError."""
        config = self.vae.config
        channels = {config.get(key, 3) for key in ("in_channels", "out_channels", "num_channels")}
        if channels != {3}:
            raise InputError(f"autoencoder {self.source} is for images of {max(channels - {3})} channels, but images are RGB")
        self._check_size(image_size)
        loaded = self.vae
        try:
            with _quiet(), torch.device("meta"):  # shapes only: nothing is computed
                self.vae = type(loaded).from_config(config).eval()
                with torch.no_grad():
                    moments = self._to_moments(torch.empty(1, 3, image_size, image_size))
                    latents = moments[:, 0] if self.needs_noise else moments
                    decoded = self._to_images(latents)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"autoencoder {self.source} cannot encode {image_size}-px images: {first_line(error)}") from error
        finally:
            self.vae = loaded
        if latents.shape[2] != latents.shape[3] or decoded.shape != (1, 3, image_size, image_size):
            small, large = ("x".join(map(str, tensor.shape[1:])) for tensor in (latents, decoded))
            raise InputError(
                f"autoencoder {self.source} makes {small} latents of 3x{image_size}x{image_size} images, but {large} images of "
                "those: use one whose images come back in their size"
            )
        return latents.shape[1], latents.shape[2]

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
        name = type(self.vae).__name__
        kind = {} if name == "AutoencoderKL" else {"autoencoder_class": name}
        return {"autoencoder_sha256": self.sha256(), **kind, **self._about}

    def _cast(self, dtype: torch.dtype) -> None:
        """Cast the weights to `dtype`, channels last."""
        if dtype != torch.float32:
            self.sha256()  # computed and kept now, because it is a hash of the fp32 weights
        with _quiet():
            self.vae = self.vae.to(dtype=dtype, memory_format=torch.channels_last)

    def for_encoding(self, dtype: torch.dtype) -> "Frozen":
        """Use `dtype`, channels last, and compile the encoder on CUDA; return the codec."""
        self._cast(dtype)
        if self.vae.device.type == "cuda":
            self.vae.encoder.compile(dynamic=False)
        return self

    def for_decoding(self, dtype: torch.dtype) -> "Frozen":
        """Use `dtype`, channels last; on CUDA the first `decode` of many images compiles the decoder. Return the codec."""
        self._cast(dtype)
        self.may_compile_decoder = self.vae.device.type == "cuda"
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return moments in the dtype of the weights. Grey images are taken as RGB."""
        images = images.expand(-1, 3, -1, -1).to(self.vae.dtype)
        if self.vae.dtype == torch.bfloat16:  # torch's bf16 convolutions are fast in this layout only
            images = images.contiguous(memory_format=torch.channels_last)
        return self._to_moments(images)

    def posterior_sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Return the latents in the model's scale, fp32 [B,c,s,s]; moments of any float dtype."""
        return (moments.float() - self.shift) * self.scale

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
        return torch.cat([self._to_images(part).float().clamp(-1, 1) for part in parts])[: len(z)]


class KL(Frozen):
    """AutoencoderKL: SD-VAE, SDXL, SD 3, FLUX.1, VA-VAE. Moments are [B,2,c,s,s], mean and log-variance of a normal posterior."""

    needs_noise = True

    def _factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _to_moments(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode(images).latent_dist
        return torch.stack((posterior.mean, posterior.logvar), dim=1)

    def posterior_sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Return mean + std·noise in the model's scale, fp32 [B,c,s,s]; moments [B,2,c,s,s] of any float dtype."""
        assert noise is not None  # needs_noise
        mean, logvar = moments.float().unbind(1)
        return (mean + torch.exp(0.5 * logvar) * noise - self.shift) * self.scale


class DC(Frozen):
    """AutoencoderDC, deep compression by 32 or 64. Moments are z [B,c,s,s]: its encoder is deterministic."""

    def _factor(self) -> int:
        return self.vae.spatial_compression_ratio

    def _to_moments(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latent


class Tiny(Frozen):
    """AutoencoderTiny, distilled from another one into its scaled latents: its own scaling factor is 1. Moments are z [B,c,s,s]."""

    def _factor(self) -> int:
        return 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)

    def _to_moments(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latents


class RAE(Frozen):
    """AutoencoderRAE, a frozen vision transformer and a decoder of its tokens. Moments are z [B,c,s,s].

    It takes and returns images in [0,1], and applies scaling factor, means and standard deviations of its latents itself.
    """

    def _read_scale(self) -> tuple[float, float, dict]:
        if not self.vae.config.reshape_to_2d:
            raise InputError(
                f"autoencoder {self.source} makes a row of tokens (reshape_to_2d=false): latents need rows and columns"
            )
        return 0.0, 1.0, {"scaling_factor": self.vae.config.scaling_factor, "shift": 0.0}

    def _check_size(self, image_size: int) -> None:
        wanted = self.vae.decoder_image_size
        if image_size != wanted:
            raise InputError(f"data.image_size={image_size} must be {wanted}, the only size that {self.source} decodes")

    def _to_moments(self, images: Tensor) -> Tensor:
        return self.vae.encode((images + 1) / 2).latent

    def _to_images(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample * 2 - 1


CODECS: dict[str, type[Frozen]] = {"AutoencoderKL": KL, "AutoencoderDC": DC, "AutoencoderTiny": Tiny, "AutoencoderRAE": RAE}


def create(source: str, image_size: int, image_channels: int, device: torch.device, vae=None) -> Codec:
    """Return the codec that data.autoencoder names: "pixels", or a folder or Hub id as in `locate`.

    image_channels: channels of the images if they are the latents. vae: the autoencoder if it is already loaded. Raises InputError
    if there is no such autoencoder.
    """
    if source == "pixels":
        return Pixels(image_channels, image_size)
    vae = vae or read(source)
    return CODECS[type(vae).__name__](source, image_size, device, vae)


def download(source: str, world: World) -> None:
    """Download the autoencoder on rank 0 if it is on the Hub, so that the others find it in the cache. All ranks must call it.

    Raises InputError on all ranks if there is no such autoencoder.
    """
    if source != "pixels":
        world.together(lambda: locate(source) and None, everywhere=False)


def difference(codec: Codec, recorded: dict) -> str | None:
    """Return how a codec differs from the one that made a latent set or a run, as "autoencoder_sha256 3f0c… there, 9b1d… here".

    recorded: entries of Codec.about() that were kept then; None or absent: they were not. Returns None if there is no difference.
    """
    known = {key: recorded[key] for key in ("autoencoder_sha256", *SCALE_ABOUT) if recorded.get(key) is not None}
    about = codec.about() if known else {}  # which hashes the weights
    for key, value in known.items():
        if about.get(key) != value:
            there, here = (text if len(text) < 24 else f"{text[:12]}…" for text in (str(value), str(about.get(key))))
            return f"{key} {there} there, {here} here"
    return None


def check(codec: Codec, recorded: dict, checkpoint: Path, source: str) -> None:
    """Raise InputError if a codec is not the one that a run was trained with.

    recorded: as in `difference`; checkpoint: the run's; source: what the codec was loaded from.
    """
    if problem := difference(codec, recorded):
        raise InputError(
            f"checkpoint {checkpoint} was trained with another autoencoder than data.autoencoder={source} holds now ({problem}): "
            "put the files of that one back"
        )


def load(
    data: DataConfig, model: ModelConfig, image_channels: int, device: torch.device, manifest: dict | None = None, vae=None
) -> Codec:
    """Return the codec of a run.

    image_channels: channels of the run's images. manifest: manifest of the latent set that the run trains on, None if it trains on
    images. vae: the autoencoder if it is already loaded. Raises InputError if the codec does not fit the model, or is not the one
    that the latent set was encoded with.
    """
    if manifest and data.autoencoder == "pixels":
        raise InputError(
            f"data.source={data.source} holds latents: set data.autoencoder={manifest['autoencoder']}, which they were made with"
        )
    codec = create(data.autoencoder, data.image_size, image_channels, device, vae)
    if manifest and (problem := difference(codec, manifest)):
        raise InputError(
            f"data.autoencoder={data.autoencoder} is not the one that the latents were made with, {manifest['autoencoder']} "
            f"({problem}): set data.autoencoder to that one, or encode again"
        )
    if (codec.channels, codec.size) != (model.in_channels, model.input_size):
        raise InputError(
            f"data.autoencoder={data.autoencoder} makes {codec.channels} channels of {codec.size}x{codec.size} from "
            f"{data.image_size}-px images: set model.in_channels={codec.channels} and model.input_size={codec.size}"
        )
    return codec
