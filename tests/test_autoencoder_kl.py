"""KL against diffusers' AutoencoderKL."""

import pytest
import torch

import autoencoders
from fastdit import autoencoder


@pytest.fixture(scope="module")
def tiny_autoencoder(tmp_path_factory):
    return autoencoders.tiny(tmp_path_factory.mktemp("vae"))


def test_autoencoder_is_a_posterior_sample_times_the_scaling_factor(tiny_autoencoder):
    codec = autoencoder.KL(str(tiny_autoencoder), 32, torch.device("cpu"))
    assert (codec.channels, codec.size) == (4, 16)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    noise = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        posterior = codec.vae.encode(images.repeat(1, 3, 1, 1)).latent_dist
        torch.testing.assert_close(codec.encode(images, noise), 0.5 * (posterior.mean + posterior.std * noise))
        z = codec.encode(images, noise)
        torch.testing.assert_close(codec.decode(z), codec.vae.decode(z / 0.5).sample.clamp(-1, 1))
