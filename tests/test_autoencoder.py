"""Codecs: what both keep of their contract, how many images a KL codec decodes at once, what it compiles and hashes."""

import pytest
import torch

import autoencoders
from fastdit import autoencoder

CPU = torch.device("cpu")


@pytest.fixture
def codec(tmp_path):
    return autoencoder.KL(str(autoencoders.tiny(tmp_path)), 32, CPU)


def test_a_compiled_decoder_sees_one_shape(codec, monkeypatch):
    """It is compiled by the first call of many images, and then the last part is filled up; before, few are decoded as they are."""
    shapes, compiled = [], []
    decoder = codec.for_decoding(torch.float32).vae.decoder
    assert not codec.may_compile_decoder  # on a CPU
    latents = torch.randn(66, 4, 16, 16)
    wanted = codec.decode(latents)
    monkeypatch.setattr(codec, "may_compile_decoder", True)
    monkeypatch.setattr(decoder, "compile", lambda **options: compiled.append(options))
    decoder.register_forward_pre_hook(lambda module, inputs: shapes.append(len(inputs[0])))
    torch.testing.assert_close(codec.decode(latents[:3]), wanted[:3])
    assert shapes == [3] and not compiled
    torch.testing.assert_close(codec.decode(latents), wanted)
    assert shapes[1:] == [8] * 9 and compiled == [{"dynamic": False}]
    torch.testing.assert_close(codec.decode(latents[:2]), wanted[:2])
    torch.testing.assert_close(codec.decode(latents[:64]), wanted[:64])
    assert set(shapes[1:]) == {8} and len(compiled) == 1


def test_the_hash_is_of_the_weights_as_they_were_loaded(codec, tmp_path):
    loaded = autoencoder.KL(str(tmp_path), 32, CPU).sha256()
    assert codec.for_encoding(torch.bfloat16).sha256() == loaded
    assert codec.for_decoding(torch.bfloat16).sha256() == loaded and codec.vae.dtype == torch.bfloat16


def test_latents_are_a_posterior_sample_times_the_scaling_factor(codec):
    assert (codec.channels, codec.size) == (4, 16)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    noise = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        posterior = codec.vae.encode(images.repeat(1, 3, 1, 1)).latent_dist
        z = codec.posterior_sample(codec.encode(images), noise)
        torch.testing.assert_close(z, 0.5 * (posterior.mean + posterior.std * noise))
        torch.testing.assert_close(codec.decode(z), codec.vae.decode(z / 0.5).sample.clamp(-1, 1))


def test_every_codec_keeps_the_contract(codec):
    """Every member of Codec, and shapes and dtypes from images to latents and back."""
    for one, image_channels in ((codec, 3), (autoencoder.Pixels(1, 32), 1)):
        members = {*autoencoder.Codec.__annotations__, *(name for name in vars(autoencoder.Codec) if name[0] != "_")}
        assert len(members) == 12 and all(hasattr(one, name) for name in members)
        assert one.image_channels == image_channels and one.about()["autoencoder_sha256"] == one.sha256()
        images = torch.rand(2, image_channels, 32, 32) * 2 - 1
        noise = torch.randn(2, one.channels, one.size, one.size) if one.needs_noise else None
        latents = one.for_encoding(torch.float32).posterior_sample(one.encode(images), noise)
        assert latents.shape == (2, one.channels, one.size, one.size) and latents.dtype == torch.float32
        decoded = one.for_decoding(torch.float32).decode(10 * latents)
        assert decoded.shape == images.shape and decoded.dtype == torch.float32 and decoded.abs().max() <= 1
