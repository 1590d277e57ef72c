"""Feature networks: precision, batches of one shape, the interface of the Inception file, sFID's resize."""

import numpy as np
import pytest
import torch
from PIL import Image

import inception as inception_net
from fastdit.config import InputError
from fastdit.data.builtin import mnist5k
from fastdit.evaluation import features

CPU = torch.device("cpu")


def test_spatial_input_is_resized_as_tensorflow_1_did():
    """Output pixel i shows input position i·S/299, between its neighbours."""
    images = torch.arange(0, 250, 10, dtype=torch.uint8).expand(1, 3, 25, 25)
    row = features._resized(images)[0, 0, 7] * 128 + 128
    position = torch.arange(299) * 25 / 299
    assert torch.allclose(row, (position * 10).clamp(max=240), atol=1e-2)
    assert torch.allclose(features._resized(images.mT)[0, 0, :, 7] * 128 + 128, row, atol=1e-2)


def test_the_network_runs_in_fp32_on_batches_of_one_shape(monkeypatch):
    """And what it says of an image does not depend on its place or on what fills the batch."""
    seen = []
    network = features.load("digits", torch.device("cpu"))
    compute = network._compute

    def watched(images):
        flags = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        seen.append((tuple(images.shape), images.dtype, *flags))
        return compute(images)

    network._compute = watched
    torch.set_float32_matmul_precision("high")
    try:
        network.probe((32, 32, 1))
        images = mnist5k("val")[0][:230]
        whole = torch.cat([part.features for part in network(images)])
        parts = torch.cat([part.features for at in range(0, 230, 41) for part in network(images[at : at + 41])])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {((features.BATCH, 1, 32, 32), torch.uint8, "highest", False)}
    assert len(whole) == 230 and torch.allclose(whole, parts, rtol=1e-5, atol=1e-6)


def test_a_torchscript_network_gives_features_probabilities_and_spatial_features(tmp_path):
    """Those of the network itself: grey images as RGB, probabilities without a bias, spatial features of up to 7 channels."""
    path = inception_net.save(tmp_path / "net.pt")
    network, net = features.load(str(path), CPU, spatial="layers.mixed.0"), torch.jit.load(str(path))
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 1), np.uint8)
    assert network.probe((40, 40, 1)) == (6, 5, 7 * 9 * 9)
    (outputs,) = network(images)
    with torch.no_grad():
        wanted = net(torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1), return_features=True)
    torch.testing.assert_close(outputs.features, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs.probabilities, (wanted @ net.output.weight.T).softmax(1), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="has no mixed_6 there"):
        features.load(str(path), CPU, spatial="layers.mixed_6")
    with pytest.raises(InputError, match="has SHA-256"):
        features.load(str(path), CPU, "ab" * 32)


@pytest.mark.parametrize("size", [300, 64])
def test_imagenet224_is_pillows_cubic_resize_normalized(size):
    """Of noise, whose overshoot both axes cut off. Pillow's weights of 22 bits decide ties, which are frequent at 64: 224."""
    image = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    found = features.imagenet224(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)).astype(np.float32)
    levels = ((found * std + mean) * 255).numpy()
    np.testing.assert_allclose(levels, wanted, rtol=0, atol=2 + 1e-3)
    assert (abs(levels - wanted) > 0.5).mean() < 1e-2  # and 2 where both axes had one


def test_a_network_of_imagenet224_is_called_with_its_input_only(tmp_path):
    net = torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten())  # a mean per tile
    path = tmp_path / "tiles.pt"
    torch.jit.trace(net, torch.zeros(2, 3, 224, 224)).save(str(path))
    network = features.load(str(path), CPU, preprocess="imagenet224")
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 1), np.uint8)
    assert network.probe((40, 40, 1)) == (48, 0, 0) and network.about()["preprocess"] == "imagenet224"
    (outputs,) = network(images)
    wanted = net(features.imagenet224(torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)))
    torch.testing.assert_close(outputs.features, wanted, rtol=0, atol=1e-6)
    for source, more, message in (("digits", {}, "is for a TorchScript file"), (str(path), {"spatial": "0"}, "--spatial '0'")):
        with pytest.raises(InputError, match=message):
            features.load(source, CPU, preprocess="imagenet224", **more)
