"""The autoencoder as codec: how many images it decodes at once, what it compiles, what its hash is of."""

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
